"""Sections of `docs/results.md` about what a step costs and about the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

from .report import command_line

OVERHEAD = Path("results", "overhead.json")
LARGER_OVERHEAD = Path("results", "overhead-larger.json")
STEERING_OVERHEAD = Path("results", "steering-overhead.json")
PREFIX_EVICTION = Path("results", "prefix-eviction.json")


def _made_by(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    where = ", ".join([f"{machine['cores']} cores of {machine['cpu']}", *machine["gpus"]])
    return f"Made by `{command_line(run['command'])}` at commit `{run['commit']}`, on {where}."


def overhead_section(figures: Mapping[str, Any]) -> list[str]:
    """What eviction costs a decode step."""
    settings = figures["run"]["settings"]
    rows = [
        (
            row["budget"],
            row["batch_size"],
            f"{row['stock_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            row["compactions"],
        )
        for row in figures["shapes"]
    ]
    if settings.get("layers"):
        heading = "### With a larger model"
        text = (
            f"The same for {settings['layers']} layers of {settings['hidden_size']} with random weights, medians of "
            f"{settings['rounds']} rounds. A step grows with the number of weights, a compaction only with the size of "
            "the KV cache, so what it costs of a step falls."
        )
    else:
        heading = "## What eviction costs a step"
        text = (
            f"`{settings['policy']}` against stock vLLM with requests of the same resident length, compactions "
            f"included, in turns; medians of {settings['rounds']} rounds of {settings['buffer']} steps. On CPUs our "
            "runner also computes slots faster than vLLM does, which is part of these ratios."
        )
    return [
        heading,
        text,
        table(("budget", "requests", "stock ms a step", "ratio", "of single rounds", "compactions"), rows, 0),
        _made_by(figures["run"]),
    ]


def steering_overhead_section(figures: Mapping[str, Any]) -> list[str]:
    """What steering costs a decode step."""
    rows = [
        (
            row["length"],
            row["batch_size"],
            f"{row['stock_ms']:.2f}",
            *(
                f"{row[f'{arm}_ratio']:.3f} ({row[f'{arm}_low']:.3f} to {row[f'{arm}_high']:.3f})"
                for arm in ("steered", "idle")
            ),
            row["steered_tokens"],
        )
        for row in figures["shapes"]
    ]
    return [
        "## What steering costs a step",
        "A server that steers all its requests, and one with a vector that steers none, against stock vLLM, in turns; "
        f"medians of {figures['run']['settings']['rounds']} rounds, and the range of single ones.",
        table(("tokens", "requests", "stock ms a step", "steered", "idle", "tokens steered"), rows, 0),
        _made_by(figures["run"]),
    ]


def prefix_eviction_section(figures: Mapping[str, Any]) -> list[str]:
    """Hit rates of LRU, Guard and Belady's rule."""
    settings = figures["run"]["settings"]
    rows = [(row["trace"], *(f"{row[name]:.3f}" for name in ("lru", "guard", "belady"))) for row in figures["traces"]]
    return [
        "## Prefix cache: LRU and Guard",
        f"Share of the prompt pages that were found, with vLLM's page pool: {settings['requests']} requests, documents "
        f"of {settings['pages']} pages, {settings['pool']} pages that fit. `zipf`: {settings['documents']} documents "
        f"by Zipf's law with exponent {settings['exponent']}; `scan`: a tenth more documents than fit, in turn; "
        "`shift`: Zipf with other favourites every 500 requests; `chat`: conversations that grow by a page a turn. "
        "*Belady* knows the future.",
        table(("trace", "lru", "guard", "belady"), rows, 1),
        _made_by(figures["run"]),
    ]
