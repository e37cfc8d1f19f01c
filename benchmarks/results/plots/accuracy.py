"""The figures: accuracy against budget, generated length against budget, KV memory against accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipkv_vllm.evaluation.figures import FULL, LOOK, OURS, RULE, draw_line, label_lines, pyplot, save, style, title

from ..arms import find, plain_arms
from ..store import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = {
    "accuracy": "Accuracy against KV budget",
    "length": "Generated length against KV budget",
    "memory": "KV memory against accuracy",
}


def draw(summary: Summary, folder: Path, prefix: str = "") -> dict[str, str]:
    """Draw all figures as SVG and PNG.

    Args:
        summary: of a run; its first batch size is drawn.
        folder: where the files go.
        prefix: of the file names.

    Returns:
        Figure -> name of its SVG file.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for figure, paint in {"accuracy": _accuracy, "length": _length, "memory": _memory}.items():
        with plt.rc_context(LOOK):
            canvas, axes = plt.subplots(figsize=(6.6, 4.1), layout="constrained")
            paint(axes, summary)
            title(axes, FIGURES[figure], subtitle(summary))
            save(canvas, folder / f"{prefix}{figure}")
            plt.close(canvas)
        names[figure] = f"{prefix}{figure}.svg"
    return names


def subtitle(summary: Summary) -> str:
    """State in a line what a figure shows."""
    settings = summary["run"]["settings"]
    model, count = Path(settings["model"]).name, len(summary["problems"])
    return f"{model}, {settings['data']}, {count} problems, batch size {settings['batch_sizes'][0]}"


def _accuracy(axes: Axes, summary: Summary) -> None:
    lines = _lines(summary, "accuracy", "accuracy_interval", 100)
    _against_budget(axes, summary, lines)
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 102)
    label_lines(axes, {policy: line.y[-1] for policy, line in lines.items()})


def _length(axes: Axes, summary: Summary) -> None:
    lines = _lines(summary, "mean_length", "length_interval", 1)
    _against_budget(axes, summary, lines)
    axes.set_ylabel("generated tokens, mean")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.1 * (high - low))
    label_lines(axes, {policy: line.y[-1] for policy, line in lines.items()})


def _against_budget(axes: Axes, summary: Summary, lines: dict[str, _Line]) -> None:
    budgets = summary["run"]["budgets"]
    for number, (policy, line) in enumerate(lines.items()):
        if policy == FULL:
            axes.axhline(line.y[0], color=RULE, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
            continue
        # Intervals of different policies stand side by side instead of on top of each other.
        shift = (number - len(lines) / 2) * 0.004 * (max(line.x) - min(line.x) or 100)
        draw_line(axes, policy, line.x, line.y, line.low, line.high, shift)
    ticks = sorted(budgets.items(), key=lambda item: item[1])
    axes.set_xticks([tokens for _, tokens in ticks])
    axes.set_xticklabels([f"{tokens}\n{text}" if text.endswith("%") else str(tokens) for text, tokens in ticks])
    shares = any(text.endswith("%") for text in budgets)
    axes.set_xlabel("KV budget, tokens" + (" and share of the mean full-KV answer" if shares else ""))
    width = max(budgets.values()) - min(budgets.values()) or 100
    axes.set_xlim(min(budgets.values()) - 0.05 * width, max(budgets.values()) + 0.05 * width)


def _memory(axes: Axes, summary: Summary) -> None:
    size = summary["run"]["settings"]["batch_sizes"][0]
    unit, name = _unit(max(arm["peak_bytes"] for arm in summary["arms"] if not arm.get("steering")))
    for policy in summary["run"]["settings"]["policies"]:
        arms = sorted(plain_arms(summary, policy), key=lambda arm: arm["budget"])
        x, y = [a["peak_bytes"] / unit for a in arms], [100 * a["accuracy"] for a in arms]
        colour, marker = style(policy)
        axes.plot(
            x,
            y,
            color=colour,
            marker="*" if policy == FULL else marker,
            markersize=14 if policy == FULL else 6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=2.4 if policy == OURS else 1.4,
            linestyle="--" if policy == "random" else "-",
            zorder=4 if policy == OURS else 3,
            label="full KV" if policy == FULL else policy,
        )
    axes.set_xlabel(f"KV memory of {size} requests at their peaks, {name}")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


class _Line:
    """The points of a policy: budgets, values and their intervals."""

    def __init__(self, x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
        self.x, self.y, self.low, self.high = x, y, low, high


def _lines(summary: Summary, key: str, interval: str, scale: float) -> dict[str, _Line]:
    settings = summary["run"]["settings"]
    size = settings["batch_sizes"][0]
    budgets = sorted(summary["run"]["budgets"].values())
    lines = {}
    for policy in settings["policies"]:
        at = [0] if policy == FULL else budgets
        arms = [arm for budget in at if (arm := find(summary, policy, budget, size))]
        lines[policy] = _Line(
            at,
            [scale * arm[key] for arm in arms],
            [scale * arm[interval][0] for arm in arms],
            [scale * arm[interval][1] for arm in arms],
        )
    return lines


def _unit(size: float) -> tuple[float, str]:
    for exponent, name in ((30, "GiB"), (20, "MiB")):
        if size >= 2**exponent:
            return float(2**exponent), name
    return 1024.0, "KiB"
