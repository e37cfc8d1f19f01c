"""The operators' speed against PyTorch and R-KV-style code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..markdown import counted, milliseconds, table
from ..provenance import made_by

MIB = 2**20


def operators_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section.

    Args:
        figures: what `python -m benchmarks.kernels` wrote.
    """
    run, settings = figures["run"], figures["run"]["settings"]
    return [
        "## The operators, timed here",
        f"One request in {settings['layers']} layers of {settings['heads']} kv heads ({settings['query_heads']} query "
        f"heads), head size {settings['dim']}, window {settings['window']}, {settings['dtype']} pages of "
        f"{settings['page_size']} tokens, {counted(run['threads'], 'thread')}. Implementations take turns and times "
        "are medians, so ratios mean more than times. *PyTorch* is the definition that every backend is tested "
        "against. *R-KV style* gathers the keys, builds the L x L matrix of cosines and rewrites all survivors.",
        scoring_table(figures["scoring"]),
        "*Distinct* keys are the worst case: no two are similar, and every pair must be compared once. *Similar* "
        "keys end the search early. *Of matmul* is the speed of those comparisons and of the logits, as a share of "
        "PyTorch's best float32 matmul in these rounds; above 100 the matmul is further from the processor's limit "
        "than the scoring is. *Memory* is the growth of the process. *Scratch* is the memory of our threads, which "
        "grows with L and not with its square.",
        *([measuring_table(figures["measuring"])] if "measuring" in figures else []),
        compaction_table(figures["compaction"]),
        "A compaction moves only the survivors of a head that lie beyond the budget; a rewrite moves all survivors. "
        "GB/s count the moved bytes. On CPUs a page keeps each element of a key in a cache line of its own, so the "
        "processor moves several times as much, whichever program asks for it.",
        made_by(run),
    ]


def scoring_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Scoring at each length."""
    head = (
        "L", "keys", "ours, ms", "PyTorch, ms", "R-KV style, ms", "against PyTorch", "against R-KV style",
        "GFLOP/s", "of matmul, %", "memory, MiB", "scratch, MiB", "R-KV style, MiB",
    )  # fmt: skip
    lines = []
    for row in rows:
        times = [milliseconds(row[f"{name}_ms"]) for name in ("ours", "pytorch", "rkv")]
        ratios = [f"{row[f'speedup_over_{name}']:.1f}x" for name in ("pytorch", "rkv")]
        speed = [f"{row['gflops']:.0f}", f"{100 * row['of_matmul']:.0f}"] if "gflops" in row else ["", ""]
        memory = [_mib(row[key]) for key in ("ours_peak_bytes", "scratch_bytes", "rkv_peak_bytes")]
        lines.append([f"{row['length']:,}", row["keys"], *times, *ratios, *speed, *memory])
    return table(head, lines)


def measuring_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Attention sums and output errors over the window's queries, and the similarity of keys, at each length."""
    names = ("attention", "error", "similarity")
    head = ("L", *(f"{name}, {whose}ms" for name in names for whose in ("", "PyTorch, ")))
    lines = [
        [
            f"{row['length']:,}",
            *(milliseconds(row[f"{name}_{who}_ms"]) for name in names for who in ("ours", "pytorch")),
        ]
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
        times = [milliseconds(row[f"{name}_ms"]) for name in ("ours", "pytorch", "rewrite")]
        moved = [f"{row['moved_per_head']:.0f} ({row['most_moved_per_head']})"]
        moved += [_mib(row[key]) for key in ("bytes", "fewest_bytes", "rewrite_bytes")]
        speed = [f"{row[key]:.1f}" for key in ("gb_per_s", "copy_gb_per_s")]
        selection = [milliseconds(row[key]) for key in ("select_ms", "select_pytorch_ms")]
        ratio = f"{row['speedup_over_rewrite']:.1f}x"
        lines.append([f"{row['budget']:,}", row["buffer"], *times, ratio, *moved, *speed, *selection])
    return table(head, lines)


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"
