"""Throughput at equal memory, batch grouping, and the simulator's error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..links import SCHEDULING
from ..markdown import milliseconds, table
from ..provenance import made_by

FIGURE = "throughput"


def throughput_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section.

    Args:
        figures: what `python -m benchmarks.throughput` wrote.
    """
    run, load, settings = figures["run"], figures["load"], figures["run"]["settings"]
    prompts = "not protected" if settings["no_protect_prompt"] else "protected"
    cache = "prefix caching too" if settings["prefix_caching"] else "no prefix cache"
    turns = (
        "Each engine has all its rounds before the next one starts" if settings["one_by_one"] else "Engines take turns"
    )
    parts = [
        "## Throughput at equal memory, measured here",
        f"All {load['requests']} requests arrive at the start: {load['prompt_tokens']:,} prompt tokens and "
        f"{load['output_tokens']:,} output tokens, at least {load['shortest_output']:,} a request. A pool of 1 holds "
        f"all of them at their full length ({load['pages']:,} blocks of {settings['block_size']} tokens). A policy "
        f"pays for its token positions out of its pool. The policy is `{settings['policy']}` with a budget of "
        f"{settings['budget']} and a buffer of {settings['buffer']}, prompts {prompts}; the model is "
        f"`{settings['model']}` in {settings['dtype']}. *Production* is vLLM with its defaults. *Same settings* has "
        f"the policy's chunk size and number of requests, and {cache}. {turns}; rates are medians of "
        f"{settings['rounds']} rounds, and ratios are medians of the rounds' ratios.",
        pools_table(figures["pools"]),
        f"![Tokens per second over pool size]({FIGURE}.svg)",
        "*ITL* counts every pause between two tokens of a request, including those with a compaction. A first token "
        "waits for a free place, so *TTFT* is mostly queueing time.",
    ]
    if figures["grouping"]:
        parts += [
            "### Batch grouping",
            f"{settings['grouping_requests']} requests with ShareGPT-like prompt lengths, "
            f"{settings['grouping_batch']} at once, in groups of {settings['grouping_width']} tokens, and in order of "
            f"arrival after {settings['grouping_max_wait']:g} s. Padding is a share of the real tokens: the padding "
            f"of CUDA graphs of vLLM's default sizes, the padding of {settings['grouping_ranks']} data-parallel ranks "
            "(each ran its part), and the padding of an engine with static batches that admits requests in the same "
            f"order. [Scheduling]({SCHEDULING}) explains what follows from these figures.",
            grouping_table(figures["grouping"]),
        ]
    if figures["predictions"]:
        parts += [
            "### The simulator against these runs",
            "Step times were fitted to the steps of the engines with the largest pool. The other rows are predictions, "
            "of the step times and of the scheduler's decisions. Pairs are measured / predicted.",
            prediction_table(figures["predictions"]),
        ]
    return [*parts, made_by(run)]


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
        times = [
            milliseconds(row[key])
            for key in ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms", "step_ms", "compaction_step_ms")
        ]
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
        lines.append([row["arm"], *rates, *padding, launches, *static, *bound, milliseconds(row["ttft_p99_ms"])])
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
