"""The figure of the steering evaluation: length and accuracy against alpha0."""

from __future__ import annotations

from pathlib import Path

from skipkv_vllm.cli.sweep_plot import label_axes
from skipkv_vllm.evaluation.figures import LOOK, pyplot, save

from ..steering import KINDS, curve, unsteered
from ..store import Summary
from .accuracy import subtitle

STYLE = {
    "static": ("#0072B2", "s", "-"),
    "dynamic": ("#D55E00", "o", "-"),
    "eviction": ("#009E73", "^", "-"),
    "random": ("#888888", "X", "--"),
}


def draw_steering(summary: Summary, path: Path) -> None:
    """Draw the figure as SVG and PNG.

    Args:
        summary: of the steering evaluation.
        path: of the files, without an ending.
    """
    plt = pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    full, evicting = unsteered(summary)
    with plt.rc_context(LOOK):
        canvas, (lengths, accuracies) = plt.subplots(
            2, 1, sharex=True, figsize=(6.8, 6.4), layout="constrained", height_ratios=(3, 2)
        )
        for kind, (colour, marker, line) in STYLE.items():
            points = curve(summary, kind)
            look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "markeredgecolor": "white"}
            alphas = [point["alpha0"] for point in points]
            lengths.plot(alphas, [point["mean_length"] for point in points], label=KINDS[kind], **look)
            accuracies.plot(alphas, [100 * point["accuracy"] for point in points], **look)
        plain = {"color": "#444444", "linewidth": 1.2, "linestyle": (0, (5, 3)), "zorder": 1}
        lengths.axhline(full["mean_length"], label="not steered", **plain)
        accuracies.axhline(100 * full["accuracy"], **plain)
        accuracies.axhline(100 * evicting["accuracy"], **plain | {"linestyle": ":", "color": "#009E73"})
        lengths.set_title("Length and accuracy against alpha0", pad=22)
        lengths.text(0, 1.04, subtitle(summary), transform=lengths.transAxes, color="#666666", fontsize=9)
        label_axes(lengths, accuracies)
        lengths.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        save(canvas, path)
        plt.close(canvas)
