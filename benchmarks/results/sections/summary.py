"""The page that says in short what the other pages show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.figures import FULL, OURS

from ..arms import budget_of, plain_arms
from ..markdown import counted, table
from ..steering import curve, unsteered
from ..store import (
    FIDELITY,
    LARGER_OVERHEAD,
    OPERATORS,
    OVERHEAD,
    PAPER,
    PREFIX_CACHE,
    SIMULATION,
    STEERING,
    STEERING_OVERHEAD,
    THROUGHPUT,
    TINY,
    UNEQUAL,
    Summary,
)
from .unequal_budgets import ALL, gains


def summary_sections(found: Mapping[Path, Summary]) -> list[str]:
    """Write a short section for each topic.

    Args:
        found: the summaries that exist, by name.
    """
    topics = {
        "Accuracy of the bundled model": (TINY, _accuracy),
        "Steering": (STEERING, _steering),
        "Unequal budgets": (UNEQUAL, _unequal),
        "Fidelity": (FIDELITY, _fidelity),
        "Cost of a step": (OVERHEAD, _overhead),
        "Cost of the operators": (OPERATORS, _operators),
        "Prefix cache": (PREFIX_CACHE, _prefix_cache),
        "Throughput": (THROUGHPUT, _throughput),
        "Predicted throughput": (SIMULATION, _simulation),
    }
    parts = []
    for title, (name, write) in topics.items():
        if name in found:
            parts += [f"## {title}", *write(found[name])]
            if name == OVERHEAD:
                parts += _other_overheads(found)
    if PAPER in found:
        parts += [
            "## Published results",
            "The [figures of the paper](published.md) are listed beside the commands that would reproduce them with "
            "this package. None of them was measured here.",
        ]
    return parts


def _accuracy(tiny: Summary) -> list[str]:
    rows = []
    (full,) = plain_arms(tiny, FULL)
    others = [p for p in tiny["run"]["settings"]["policies"] if p not in (FULL, OURS)]
    for arm in plain_arms(tiny, OURS):
        same = [a for other in others for a in plain_arms(tiny, other) if a["budget"] == arm["budget"]]
        best = max(same, key=lambda each: each["accuracy"])
        rows.append(
            (
                budget_of(arm),
                f"{100 * arm['accuracy']:.1f}",
                f"{100 * best['accuracy']:.1f} (`{best['policy']}`)",
                f"{arm['peak_bytes'] / full['peak_bytes']:.0%}",
            )
        )
    text = (
        f"Right answers of the bundled model on {len(tiny['problems'])} held-out problems, in %; full KV solves "
        f"{100 * full['accuracy']:.0f} %."
    )
    if pairs := tiny["batch_invariance"]:
        compared, changed = (sum(row[key] for row in pairs) for key in ("compared", "other_answer"))
        text += f" Of {compared} answers that were generated at two batch sizes, {changed} differ."
    head = ("budget", OURS, "best other method", "KV memory, of full KV's")
    return [text, table(head, rows, left=1), "[All methods and intervals](accuracy.md#the-bundled-model-run-here)"]


def _steering(summary: Summary) -> list[str]:
    full, _ = unsteered(summary)
    lengths = {kind: {p["alpha0"]: p for p in curve(summary, kind)} for kind in ("dynamic", "eviction")}
    rows = [
        [f"{alpha0:g}"]
        + [
            cell
            for kind in ("dynamic", "eviction")
            for cell in (
                f"{lengths[kind][alpha0]['mean_length']:,.0f}",
                f"{100 * lengths[kind][alpha0]['accuracy']:.1f}",
            )
        ]
        for alpha0 in summary["shown"]
    ]
    return [
        "Dynamic steering shortens the bundled model's answers. Without steering they have "
        f"{full['mean_length']:,.0f} tokens. Some strengths cost accuracy together with eviction.",
        table(("alpha0", "tokens", "right, %", f"tokens with {OURS}", "right, %"), rows),
        "[All strengths, random vectors and the choice of the layer](accuracy.md#steering-the-bundled-model-run-here)",
    ]


def _unequal(figures: Summary) -> list[str]:
    overall = [row for row in gains(figures["arms"]) if row["base"] == ALL and row["shares"] != "equal"]
    best = max(overall, key=lambda row: row["gain"])
    return [
        f"Dividing the same total unequally among layers or heads gains at most {best['gain']:.1f} points over all "
        f"methods and budgets (`{best['shares']}`, 95 % interval {best['low']:.1f} to {best['high']:.1f}), in a dense "
        "reference. [Details](accuracy.md#unequal-budgets-for-layers-and-heads-in-a-dense-reference)",
    ]


def _fidelity(report: Summary) -> list[str]:
    settings, rows = report["settings"], []
    for budget in sorted(settings["budgets"]):
        here = sorted((row for row in report["rows"] if row["budget"] == budget), key=lambda row: row["excess"])
        ours = next(row for row in here if row["method"] == OURS)
        other = next(row for row in here if row["method"] != OURS)
        rows.append((f"{budget:,}", f"{ours['excess']:.3f}", f"{other['excess']:.3f} (`{other['method']}`)"))
    return [
        f"Loss of prediction on {counted(settings['texts'], 'text')} of {settings['length']:,} tokens with "
        f"`{Path(settings['model']).name}`, in nats a token; smaller is better.",
        table(("budget", OURS, "best other method"), rows),
        "[All methods, intervals, kinds of text, and recall of facts](fidelity.md)",
    ]


def _overhead(figures: Summary) -> list[str]:
    return [
        f"A decode step of the bundled model with `{figures['run']['settings']['policy']}` takes "
        f"{_range(figures['shapes'], 'ratio')} times as long as with stock vLLM at the same resident length. "
        "[Details](cost.md#what-eviction-costs-a-step)"
    ]


def _other_overheads(found: Mapping[Path, Summary]) -> list[str]:
    parts = []
    if figures := found.get(LARGER_OVERHEAD):
        settings = figures["run"]["settings"]
        parts.append(
            f"With {settings['layers']} layers of {settings['hidden_size']} the ratio is "
            f"{_range(figures['shapes'], 'ratio')}. [Details](cost.md#with-a-larger-model)"
        )
    if figures := found.get(STEERING_OVERHEAD):
        parts.append(
            f"With steering instead of eviction it is {_range(figures['shapes'], 'steered_ratio')}. "
            "[Details](cost.md#what-steering-costs-a-step)"
        )
    return parts


def _range(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"


def _operators(figures: Summary) -> list[str]:
    scoring, moving = figures["scoring"], figures["compaction"]
    slow, fast = _ends(scoring, "speedup_over_rkv")
    low, high = _ends(moving, "speedup_over_rewrite")
    return [
        f"Scoring is {slow:.1f} to {fast:.0f} times as fast as R-KV-style code, and a compaction {low:.1f} to "
        f"{high:.0f} times as fast as a full rewrite. [Details](cost.md#the-operators-timed-here)"
    ]


def _ends(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """The smallest and the largest figure of the rows that have it: calls of several requests are not compared."""
    found = [row[key] for row in rows if key in row]
    return min(found), max(found)


def _prefix_cache(figures: Summary) -> list[str]:
    rows = [(row["trace"], *(f"{row[name]:.3f}" for name in ("lru", "guard"))) for row in figures["traces"]]
    return [
        "Share of the prompt blocks found in the prefix cache, by trace.",
        table(("trace", "lru", "guard"), rows, 1),
        "[Details](cost.md#prefix-cache-lru-and-guard)",
    ]


def _throughput(figures: Summary) -> list[str]:
    rows = [
        (f"{row['pool']:g}", row["arm"], f"{row['tokens_per_second']:,.0f}", f"{row['preemptions']:,}")
        for row in figures["pools"]
    ]
    return [
        "Full KV and a policy at equal memory for KV, on the machine that the page names. A pool of 1 holds all "
        "requests at their full length.",
        table(("pool", "engine", "tokens/s", "preemptions"), rows),
        "[Latencies, batch grouping and the simulator's error](throughput.md)",
    ]


def _simulation(figures: Summary) -> list[str]:
    rows: dict[str, list[float]] = {}
    for row in figures["rows"]:
        rows.setdefault(row["model"], []).append(row["ratio"])
    lines = [(model, f"{min(ratios):.1f}x to {max(ratios):.1f}x") for model, ratios in rows.items()]
    return [
        f"Tokens per second with a budget of {figures['run']['settings']['budget']:,}, over full KV, as a simulator "
        f"predicts them for {figures['run']['settings']['gpu']} GPUs. **None of these was measured.**",
        table(("model", "predicted ratio"), lines),
        "[By output length and number of GPUs](throughput.md#predicted-throughput-on-gpus-not-measured)",
    ]
