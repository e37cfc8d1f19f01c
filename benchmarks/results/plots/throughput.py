"""The crossover: tokens per second over the size of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.figures import LOOK, pyplot, save, title

from ..sections.throughput import FIGURE


def draw_throughput(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Draw the rate of all engines as SVG and PNG; returns the SVG file.

    Args:
        rows: `pools` of a summary of `benchmarks.throughput`.
        folder: where the files go.
    """
    plt = pyplot()
    with plt.rc_context(LOOK):
        canvas, axes = plt.subplots(figsize=(6.6, 4.1), layout="constrained")
        for arm, marker in zip(dict.fromkeys(row["arm"] for row in rows), "os^Dv", strict=False):
            points = sorted((row["pool"], row["tokens_per_second"]) for row in rows if row["arm"] == arm)
            axes.plot(*zip(*points, strict=True), marker=marker, label=arm)
        axes.set_xscale("log")
        ticks = sorted({row["pool"] for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pool, as a share of what full KV needs for the load")
        axes.set_ylabel("output tokens per second")
        axes.legend(frameon=False)
        title(axes, "Throughput against pool size", "all requests arrive at the start, engines at equal memory")
        save(canvas, folder / FIGURE)
        plt.close(canvas)
    return folder / f"{FIGURE}.svg"
