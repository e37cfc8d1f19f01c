"""What eviction and steering cost a decode step, and what Guard does for the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..markdown import table
from ..provenance import made_by


def overhead_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about eviction.

    Args:
        figures: what `python -m benchmarks.overhead` wrote, for the bundled model or with `--layers`.
    """
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
            f"The same comparison for {settings['layers']} layers of {settings['hidden_size']} with random weights, "
            f"medians of {settings['rounds']} rounds. The time of a step grows with the number of weights, that of a "
            "compaction only with the size of the KV cache, so a compaction costs a smaller share of a step."
        )
    else:
        heading = "## What eviction costs a step"
        text = (
            f"`{settings['policy']}` and stock vLLM take turns, with requests of the same resident length. Compactions "
            f"are included; the figures are medians of {settings['rounds']} rounds of {settings['buffer']} steps. On "
            "CPUs our runner also computes slots faster than vLLM does, which is part of these ratios."
        )
    return [
        heading,
        text,
        table(("budget", "requests", "stock ms a step", "ratio", "of single rounds", "compactions"), rows),
        made_by(figures["run"]),
    ]


def steering_overhead_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about steering.

    Args:
        figures: what `python -m benchmarks.overhead --steering` wrote.
    """
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
        "A server that steers all its requests (*steered*) and one with a vector that steers none (*idle*) take turns "
        f"with stock vLLM. The ratios are medians of {figures['run']['settings']['rounds']} rounds, with the range of "
        "single rounds.",
        table(("tokens", "requests", "stock ms a step", "steered", "idle", "tokens steered"), rows),
        made_by(figures["run"]),
    ]


def prefix_cache_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about the hit rates of LRU, Guard and Belady's rule.

    Args:
        figures: what `python -m benchmarks.prefix_eviction` wrote.
    """
    settings = figures["run"]["settings"]
    rows = [(row["trace"], *(f"{row[name]:.3f}" for name in ("lru", "guard", "belady"))) for row in figures["traces"]]
    return [
        "## Prefix cache: LRU and Guard",
        "Share of the prompt blocks that were found in the prefix cache, with vLLM's block pool. Each trace has "
        f"{settings['requests']} requests; a document has {settings['pages']} blocks, and {settings['pool']} blocks "
        "fit.",
        f"- `zipf`: {settings['documents']} documents by Zipf's law with exponent {settings['exponent']}.\n"
        "- `scan`: a tenth more documents than fit, in turn.\n"
        "- `shift`: Zipf's law with other favourites every 500 requests.\n"
        "- `chat`: conversations that grow by a block a turn.",
        "*Belady* is the best possible rule; it knows the future.",
        table(("trace", "lru", "guard", "belady"), rows, 1),
        made_by(figures["run"]),
    ]
