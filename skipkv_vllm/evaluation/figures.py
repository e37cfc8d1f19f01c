"""Style of all plots: colours and markers of methods, and labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import KVPolicyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = "full"
OURS = "skipkv"
# Okabe and Ito's colours, distinguishable for colour-blind readers; the markers are for print in grey.
STYLE: dict[str, tuple[str, str]] = {
    OURS: ("#D55E00", "o"),
    "rkv": ("#0072B2", "s"),
    "h2o": ("#009E73", "^"),
    "snapkv": ("#CC79A7", "D"),
    "streaming_llm": ("#E69F00", "v"),
    "random": ("#888888", "X"),
}
SPARE = (("#56B4E9", "P"), ("#000000", "*"), ("#8B6F00", "h"))
RULE = "#444444"
LABEL_GAP = 0.052  # smallest distance between two labels, as a share of the axis

LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    # The same plot gives the same file.
    "svg.hashsalt": "skipkv",
    "svg.fonttype": "path",
}


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up to draw into files.

    Raises:
        KVPolicyError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise KVPolicyError("plots need the package matplotlib: pip install 'skipkv-vllm[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(canvas: Figure, path: Path) -> None:
    """Write a figure as SVG and PNG; the path has no suffix."""
    canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    canvas.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})


def title(axes: Axes, text: str, subtitle: str) -> None:
    """Write a figure's title and, below it, a subtitle."""
    axes.set_title(text, pad=22)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color="#666666", fontsize=9)


def draw_line(
    axes: Axes,
    method: str,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    shift: float = 0.0,
) -> None:
    """Draw a method's values against the budget, with their intervals.

    Args:
        axes: of the figure.
        method: determines colour and marker.
        x, y, low, high: budget, value and interval of each point.
        shift: horizontal shift of the intervals, so that those of several methods do not overlap.
    """
    colour, marker = style(method)
    axes.vlines([each + shift for each in x], low, high, color=colour, alpha=0.35, linewidth=1.6, zorder=2)
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markersize=6.5 if method == OURS else 5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=2.6 if method == OURS else 1.6,
        linestyle="--" if method == "random" else "-",
        zorder=4 if method == OURS else 3,
    )


def label_lines(axes: Axes, ends: Mapping[str, float]) -> None:
    """Write each method's name at the right end of its line, without overlaps.

    Args:
        axes: of the figure.
        ends: method -> value at the end of its line.
    """
    low, high = axes.get_ylim()
    wanted = sorted((y, method) for method, y in ends.items())
    heights = spread([(y - low) / (high - low) for y, _ in wanted], LABEL_GAP)
    for height, (y, method) in zip(heights, wanted, strict=True):
        colour, _ = style(method)
        axes.annotate(
            "full KV" if method == FULL else method,
            xy=(1.0, (y - low) / (high - low)),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontweight="bold" if method == OURS else "normal",
            fontsize=9.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights at least `gap` apart, with the smallest total movement."""
    groups: list[tuple[float, list[float]]] = []  # bottom of each stack, and the original heights of its members

    def bottom(members: list[float]) -> float:
        return sum(y - i * gap for i, y in enumerate(members)) / len(members)

    for height in heights:
        members = [height]
        while groups and groups[-1][0] + gap * len(groups[-1][1]) > bottom(members):
            members = groups.pop()[1] + members
        groups.append((bottom(members), members))
    return [start + i * gap for start, members in groups for i in range(len(members))]


def style(policy: str) -> tuple[str, str]:
    """Return the colour and marker of a policy, the same in every plot."""
    if policy == FULL:
        return RULE, "*"
    return STYLE.get(policy) or SPARE[sum(map(ord, policy)) % len(SPARE)]
