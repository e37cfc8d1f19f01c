"""Steering the bundled model: length and accuracy by strength, and the choice of the vector's layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipkv_vllm.evaluation.figures import OURS

from ..arms import NOTES, arms_table, setting
from ..markdown import table
from ..provenance import how_it_was_made
from ..steering import KINDS, curve, unsteered
from ..store import SWEEP, Summary

FIGURE = "steering-strength"


def steering_section(summary: Summary) -> list[str]:
    """Write the section.

    Args:
        summary: contents of `steering.json`.
    """
    vector = summary["vector"]
    counts = ", ".join(f"{vector[key]:,} {key}" for key in ("execution", "reflection", "transition"))
    parts = [
        "## Steering the bundled model, run here",
        "The bundled vector is the mean state before the model goes on (*Find*, *Done*) minus the mean state before it "
        f"doubts (*Wait*). It was taken from the model's own answers to training problems: {counts} thoughts, layer "
        f"{vector['layer']} of {vector['num_layers']}, norm {vector['norm']:.1f}, split-half cosine "
        f"{vector['split_half_cosine']:.4f}. The engine adds it alpha times at the end of each thought. With *static* "
        "steering alpha is alpha0; *dynamic* steering adds gamma for each doubt so far. The model was also trained on "
        "texts with fewer doubts, so it knows how to leave them out. The figures do not show how much shorter the "
        "answers of another model become.",
        setting(summary),
        headline(summary),
        lowest(summary),
        f"![Length and accuracy against alpha0]({FIGURE}.svg)",
        *(side_by_side(summary, alpha0) for alpha0 in summary["shown"]),
        "*Doubts* are sentences with *Wait*, *Alternatively* or *again*; *steered* counts the tokens that the vector "
        "was added to. Where eviction shows no compaction, the answers ended before there was anything to evict. "
        "Random vectors have the same norm and enter the same layer; their rows are means over the vectors.",
        "### All arms",
        arms_table(summary),
        NOTES,
        "### How it was made",
        how_it_was_made(summary["run"]),
    ]
    return [part for part in parts if part]


def headline(summary: Summary) -> str:
    """Compare dynamic steering with none, with and without eviction, at the strengths that are shown."""
    full, _ = unsteered(summary)
    lines = []
    for kind in ("dynamic", "eviction"):
        for point in curve(summary, kind):
            if point["alpha0"] in summary["shown"]:
                shorter = 100 * (1 - point["mean_length"] / full["mean_length"])
                points = 100 * (point["accuracy"] - full["accuracy"])
                lines.append(
                    f"- **{KINDS[kind]}, alpha0 {point['alpha0']:g}**: answers {shorter:.0f} % shorter than with full "
                    f"KV and no steering ({point['mean_length']:,.0f} instead of {full['mean_length']:,.0f} tokens), "
                    f"{100 * point['accuracy']:.1f} % right ({points:+.1f} points)."
                )
    return "\n".join(lines)


def lowest(summary: Summary) -> str:
    """Name the strength at which steering together with eviction is worst; empty where it costs less than a point."""
    worst = min(curve(summary, "eviction"), key=lambda point: point["accuracy"])
    return (
        f"Not every strength goes well with eviction: at alpha0 {worst['alpha0']:g}, {100 * worst['accuracy']:.1f} % "
        "are right. Where the vector is just strong enough to end a doubt, the model may also repeat a step that it "
        "has already done."
        if worst["accuracy"] < unsteered(summary)[1]["accuracy"] - 0.01
        else ""
    )


def side_by_side(summary: Summary, alpha0: float) -> str:
    """All kinds at one strength."""
    full, evicting = unsteered(summary)
    rows = [("none", *_cells(full, full)), (f"none, with {OURS}", *_cells(evicting, full))]
    for kind, name in KINDS.items():
        for point in curve(summary, kind):
            if point["alpha0"] == alpha0:
                several = f" (mean of {point['vectors']})" if point["vectors"] > 1 else ""
                rows.append((name + several, *_cells(point["arm"] or point, full)))
    head = ("steering", "right, %", "tokens written", "to none, %", "cut off, %", "doubts", "steered", "compactions")
    return f"Side by side at alpha0 {alpha0:g}:\n\n" + table(head, rows, left=1)


def _cells(arm: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy = f"{100 * arm['accuracy']:.1f}"
    if interval := arm.get("accuracy_interval"):
        accuracy += " [{:.1f}, {:.1f}]".format(*(100 * end for end in interval))
    counts = (f"{arm[key]:.1f}" if key in arm else "" for key in ("doubts", "steered_tokens"))
    return (
        accuracy,
        f"{arm['mean_length']:,.0f}",
        f"{100 * (arm['mean_length'] / full['mean_length'] - 1):+.1f}",
        f"{100 * arm['truncated']:.1f}",
        *counts,
        f"{arm['compactions']:.1f}",
    )


def layer_section(sweep: Mapping[str, Any]) -> list[str]:
    """Show how layer and strength were chosen.

    Args:
        sweep: contents of `steering-sweep.json`.
    """
    plain, *cells = sweep["cells"]
    layers = sorted({cell["layer"] for cell in cells})
    strengths = sorted({cell["alpha0"] for cell in cells})
    by_place = {(cell["layer"], cell["alpha0"]): cell for cell in cells}
    rows = [(layer, *(_sweep_cell(by_place[layer, alpha0]) for alpha0 in strengths)) for layer in layers]
    return [
        "### Which layer",
        f"`skipkv extract-vector --layer auto` on {sweep['settings']['dev_problems']} dev problems, with static "
        "steering. A cell has the mean length in tokens, and the right answers in % where they are not "
        f"{100 * plain['accuracy']:.0f}. Without steering the model writes {plain['mean_length']:,.0f} tokens. Layer 0 "
        "is left out, because every thought begins with the same state at its input.",
        table(("layer", *(f"alpha0 {alpha0:g}" for alpha0 in strengths)), rows),
        f"![Length and accuracy by layer]({SWEEP.stem}.svg)",
        "`make vector` made the vector, this table and this figure.",
    ]


def _sweep_cell(cell: Mapping[str, Any]) -> str:
    wrong = "" if cell["accuracy"] == 1 else f" ({100 * cell['accuracy']:.0f} %)"
    return f"{cell['mean_length']:,.0f}{wrong}"
