"""The crossover: tokens per second over the size of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .section import FIGURE


def crossover(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Draw all engines; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "skipkv"  # the same figures make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
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
    axes.grid(alpha=0.3)
    path = folder / FIGURE
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
