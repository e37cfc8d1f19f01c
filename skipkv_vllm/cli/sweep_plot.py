"""Plot a sweep: length and accuracy against strength, one line per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import KVPolicyError
from ..steering.extraction.sweep import Cell


def plot(plain: Cell, cells: Sequence[Cell], path: Path) -> Path:
    """Plot a sweep.

    Args:
        plain: the model without steering; a dashed line.
        cells: the grid.
        path: of the SVG file.

    Returns:
        The path.

    Raises:
        KVPolicyError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise KVPolicyError("plots need the package matplotlib: pip install 'skipkv-vllm[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = sorted({c.layer for c in cells if c.layer is not None})
    with plt.rc_context({"svg.hashsalt": "skipkv", "axes.spines.top": False, "axes.spines.right": False}):
        canvas, (lengths, accuracies) = plt.subplots(2, 1, sharex=True, figsize=(6.6, 6), layout="constrained")
        colours = matplotlib.colormaps["viridis"]
        for number, layer in enumerate(layers):
            line = sorted((c for c in cells if c.layer == layer), key=lambda c: c.alpha0)
            look = {"marker": "o", "markersize": 4, "color": colours(number / max(1, len(layers) - 1) * 0.9)}
            alphas = [c.alpha0 for c in line]
            lengths.plot(alphas, [c.mean_length for c in line], label=f"layer {layer}", **look)
            accuracies.plot(alphas, [100 * c.accuracy for c in line], **look)
        lengths.axhline(plain.mean_length, color="#444444", linestyle="--", linewidth=1, label="not steered")
        accuracies.axhline(100 * plain.accuracy, color="#444444", linestyle="--", linewidth=1)
        label_axes(lengths, accuracies)
        lengths.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        canvas.savefig(path, metadata={"Date": None})
        plt.close(canvas)
    return path


def label_axes(lengths: Any, accuracies: Any) -> None:
    """Label and limit the axes of two plots over alpha0: length above, accuracy below."""
    lengths.set_ylabel("generated tokens, mean")
    lengths.set_ylim(bottom=0)
    accuracies.set_ylabel("right answers, %")
    accuracies.set_ylim(0, 104)
    accuracies.set_xlabel("alpha0")
