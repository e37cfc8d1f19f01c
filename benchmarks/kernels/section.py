"""The section of `docs/results.md` about the operators' speed, made of `docs/results/kernels.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

KERNELS = Path("results", "kernels.json")
MIB = 2**20


def kernels_section(figures: Mapping[str, Any]) -> list[str]:
    """Paragraphs in Markdown.

    Args:
        figures: what `python -m benchmarks.kernels` wrote.
    """
    run, settings = figures["run"], figures["run"]["settings"]
    machine = run["machine"]
    return [
        "## The operators, timed here",
        f"One request in {settings['layers']} layers of {settings['heads']} kv heads ({settings['query_heads']} query "
        f"heads), head size {settings['dim']}, window {settings['window']}, {settings['dtype']} pages of "
        f"{settings['page_size']} tokens, {run['threads']} thread(s). Implementations take turns, times are medians, "
        "so ratios mean more than times. *PyTorch* is the definition that every backend is tested against; *R-KV "
        "style* gathers the keys, builds the L x L matrix of cosines and rewrites all survivors.",
        scoring_table(figures["scoring"]),
        "*Distinct* keys are the worst case: no two are similar, and every pair has to be looked at once. The share of "
        "the machine is what those pairs and the logits take, against PyTorch's best float32 matmul of these rounds; "
        "above 100 the matmul is further from the processor's limit than the scoring is. "
        "*Similar* keys end the search early. Memory is what the process grew by, and the scratch that our threads "
        "take, which grows with L and not with its square.",
        *([measuring_table(figures["measuring"])] if "measuring" in figures else []),
        compaction_table(figures["compaction"]),
        "A head moves the survivors that lie beyond the budget, and no other token; a rewrite moves all. GB/s count "
        "what was moved. Pages of CPUs hold each element of a key in a cache line of its own, so that the processor "
        "moves several times as much, whoever asks.",
        f"Made by `{shlex.join(run['command'])}` at commit `{run['commit']}` on {run['date']}, on "
        f" {machine['cores']} cores of {machine['cpu']}.{' ' + run['note'] if run['note'] else ''}",
    ]


def scoring_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Scoring at each length."""
    head = (
        "L", "keys", "ours, ms", "PyTorch, ms", "R-KV style, ms", "against PyTorch", "against R-KV style",
        "GFLOP/s", "of matmul, %", "memory, MiB", "scratch, MiB", "R-KV style, MiB",
    )  # fmt: skip
    lines = []
    for row in rows:
        times = [_ms(row[f"{name}_ms"]) for name in ("ours", "pytorch", "rkv")]
        ratios = [f"{row[f'speedup_over_{name}']:.1f}x" for name in ("pytorch", "rkv")]
        speed = [f"{row['gflops']:.0f}", f"{100 * row['of_matmul']:.0f}"] if "gflops" in row else ["", ""]
        memory = [_mib(row[key]) for key in ("ours_peak_bytes", "scratch_bytes", "rkv_peak_bytes")]
        lines.append([f"{row['length']:,}", row["keys"], *times, *ratios, *speed, *memory])
    return table(head, lines)


def measuring_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The sums of attention and output errors over the window's queries, and the similarity of keys, at each length."""
    names = ("attention", "error", "similarity")
    head = ("L", *(f"{name}, {who}ms" for name in names for who in ("", "PyTorch, ")))
    lines = [
        [f"{row['length']:,}", *(_ms(row[f"{name}_{who}_ms"]) for name in names for who in ("ours", "pytorch"))]
        for row in rows
    ]
    return table(head, lines)


def compaction_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Compaction to each budget."""
    head = (
        "budget", "buffer", "ours, ms", "PyTorch, ms", "rewrite, ms", "against rewrite", "moved a head (most)",
        "moved, MiB", "fewest, MiB", "rewrite, MiB", "GB/s", "copy, GB/s", "selection, ms", "PyTorch, ms",
    )  # fmt: skip
    lines = []
    for row in rows:
        times = [_ms(row[f"{name}_ms"]) for name in ("ours", "pytorch", "rewrite")]
        moved = [f"{row['moved_per_head']:.0f} ({row['most_moved_per_head']})"]
        moved += [_mib(row[key]) for key in ("bytes", "fewest_bytes", "rewrite_bytes")]
        speed = [f"{row[key]:.1f}" for key in ("gb_per_s", "copy_gb_per_s")]
        selection = [_ms(row[key]) for key in ("select_ms", "select_pytorch_ms")]
        ratio = f"{row['speedup_over_rewrite']:.1f}x"
        lines.append([f"{row['budget']:,}", row["buffer"], *times, ratio, *moved, *speed, *selection])
    return table(head, lines)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"
