"""The sections of `docs/results.md` about throughput, made of `docs/results/throughput.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

THROUGHPUT = Path("results", "throughput.json")
FIGURE = "throughput.svg"


def throughput_section(figures: Mapping[str, Any]) -> list[str]:
    """Paragraphs in Markdown.

    Args:
        figures: what `python -m benchmarks.throughput` wrote.
    """
    run, load, settings = figures["run"], figures["load"], figures["run"]["settings"]
    machine = run["machine"]
    device = " and ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['cpu']}"
    prompts = "evicted too" if settings["no_protect_prompt"] else "protected"
    cache = "prefix caching too" if settings["prefix_caching"] else "no prefix cache"
    turns = (
        "Each engine has all its rounds before the next one starts" if settings["one_by_one"] else "Engines take turns"
    )
    parts = [
        "## Throughput at equal memory, measured here",
        f"{load['requests']} requests that are all there at the start: {load['prompt_tokens']:,} prompt and "
        f"{load['output_tokens']:,} output tokens, at least {load['shortest_output']:,} a request. A pool of 1 holds "
        f"all of them at their full length ({load['pages']:,} pages of {settings['block_size']} tokens); a policy pays "
        f"for its positions out of its pool. `{settings['policy']}` with a budget of {settings['budget']} and a buffer "
        f"of {settings['buffer']}, prompts {prompts}, model `{settings['model']}` in {settings['dtype']}. *Production* "
        "is vLLM as it starts by default; *same settings* has the policy's chunk size and number of requests, and "
        f"{cache}. {turns}; rates are medians of {settings['rounds']} rounds, ratios medians of the rounds' ratios.",
        pools_table(figures["pools"]),
        f"![tokens per second over pool size](results/{FIGURE})",
        "*ITL* counts every pause between two tokens of a request, those with a compaction in them too. A first token "
        "waits for a place, so *TTFT* is mostly the queue.",
    ]
    if figures["grouping"]:
        parts += [
            "### Batch grouping",
            f"{settings['grouping_requests']} requests of ShareGPT-like prompt lengths, {settings['grouping_batch']} "
            f"at once, groups of {settings['grouping_width']} tokens, order of arrival after "
            f"{settings['grouping_max_wait']:g} s. Shares are of the real tokens: what CUDA graphs of vLLM's default "
            f"sizes would pad, what {settings['grouping_ranks']} data-parallel ranks would pad (each ran its part), "
            "and what an engine with static batches would pay for the same order of admission. "
            "[scheduling.md](scheduling.md) says what follows from it.",
            grouping_table(figures["grouping"]),
        ]
    if figures["predictions"]:
        parts += [
            "### The simulator against these runs",
            "Step times were fitted to the steps of the engines with the largest pool; the others are predictions, of "
            "step times and of what the scheduler does. Pairs are measured / predicted.",
            prediction_table(figures["predictions"]),
        ]
    parts.append(
        f"Made by `{shlex.join(run['command'])}` at commit `{run['commit']}` on {run['date']}, on {device}."
        f"{' ' + run['note'] if run['note'] else ''}"
    )
    return parts


def pools_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per engine and pool."""
    head = (
        "pool", "engine", "tokens/s", "requests/s", "of full, same settings", "of full, production",
        "of full, largest pool", "TTFT p50, ms", "ITL p50, ms", "ITL p99, ms", "step, ms", "with compaction, ms",
        "at once", "preemptions", "compactions",
    )  # fmt: skip
    lines = []
    for row in rows:
        ratios = [f"{row[key]:.2f}" for key in ("of_same", "of_production", "of_full_at_largest")]
        times = [_ms(row[key]) for key in ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms", "step_ms", "compaction_step_ms")]
        counts = [f"{row[key]:,}" for key in ("peak_running", "preemptions", "compactions")]
        rates = [f"{row['tokens_per_second']:,.0f}", f"{row['requests_per_second']:.2f}"]
        lines.append([f"{row['pool']:g}", row["arm"], *rates, *ratios, *times, *counts])
    return table(head, lines)


def grouping_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row with and a row without grouping."""
    head = (
        "engine", "tokens/s", "of ungrouped", "graph padding", "data-parallel padding", "compactions a launch",
        "static batches: prompt padding", "output padding", "overtaken past turn, s", "bound, s", "TTFT p99, ms",
    )  # fmt: skip
    lines = []
    for row in rows:
        padding = [f"{row[key]:.1%}" for key in ("graph_padding", "parallel_padding")]
        static = [f"{row[key]:.1%}" for key in ("static_prompt_padding", "static_output_padding")]
        bound = ["", ""] if row["bound"] is None else [f"{row['longest_overtaken']:.2f}", f"{row['bound']:g}"]
        rates = [f"{row['tokens_per_second']:,.0f}", f"{row['of_ungrouped']:.3f}"]
        launches = f"{row['compactions_a_launch']:.2f}"
        lines.append([row["arm"], *rates, *padding, launches, *static, *bound, _ms(row["ttft_p99_ms"])])
    return table(head, lines)


def prediction_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per engine and pool."""
    head = (
        "pool", "engine", "tokens/s", "predicted", "error", "steps", "at once", "preemptions", "compactions",
    )  # fmt: skip
    lines = []
    for row in rows:
        pairs = [
            " / ".join(f"{n:,}" for n in row[key]) for key in ("steps", "peak_running", "preemptions", "compactions")
        ]
        error = f"{row['error']:+.1%}{' (fitted)' if row['fitted'] else ''}"
        lines.append(
            [f"{row['pool']:g}", row["arm"], f"{row['measured']:,.0f}", f"{row['predicted']:,.0f}", error, *pairs]
        )
    return table(head, lines)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
