"""The steering evaluation: the arms, the random vectors that they are compared with, and the section of the docs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.markdown import table
from skipkv_vllm.steering import SteeringVector

from .grid import FULL, Steer
from .report import NOTES, arms_table, provenance, setting
from .summary import OURS, Summary, find

STEERING = Path("results", "steering.json")
SWEEP = Path("results", "steering-sweep.json")
STEERING_FIGURE = "steering-strength"

VECTOR = "bundled"
RANDOM = "random-"

KINDS = {
    "static": "static",
    "dynamic": "dynamic",
    "eviction": f"dynamic, with {OURS}",
    "random": "random vectors, dynamic",
}
"""Ways to steer that are compared -> their names in tables and figures."""


def random_vectors(vector: SteeringVector, count: int, folder: Path) -> dict[str, str]:
    """Write vectors of the same norm, for the same layer, that point anywhere: name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for seed in range(count):
        drawn = torch.randn(vector.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = (drawn * vector.norm / drawn.norm()).float()
        file = folder / f"{RANDOM}{seed}.safetensors"
        vector.with_values(values, f"random, seed {seed}").save(file)
        files[f"{RANDOM}{seed}"] = str(file)
    return files


def ways_to_steer(
    alpha0: Sequence[float], gamma: float, random: Iterable[str], random_alpha0: Sequence[float]
) -> list[str]:
    """`Settings.steering` of the evaluation: each kind at each strength."""
    ways = [f"{FULL}/{Steer(VECTOR, alpha, 0.0)}" for alpha in alpha0]
    ways += [f"{policy}/{Steer(VECTOR, alpha, gamma)}" for policy in (FULL, OURS) for alpha in alpha0]
    return ways + [f"{FULL}/{Steer(name, alpha, gamma)}" for name in random for alpha in random_alpha0]


def describe_vector(file: str) -> dict[str, Any]:
    """What is known of a vector, for the record."""
    vector = SteeringVector.load(file)
    known = {key: value for key, value in vars(vector).items() if key != "values"}
    return {"file": file, "norm": vector.norm, "hidden_size": vector.hidden_size} | known


# ---- figures by kind


def curve(summary: Summary, kind: str) -> list[dict[str, Any]]:
    """The arms of a kind by strength; random vectors are averaged. Accuracies and their intervals are shares of 1."""
    arms = [arm for arm in summary["arms"] if arm.get("steering") and kind_of(arm) == kind]
    strengths = sorted({arm["alpha0"] for arm in arms})
    points = []
    for alpha0 in strengths:
        here = [arm for arm in arms if arm["alpha0"] == alpha0]
        means = ("accuracy", "mean_length", "truncated", "compactions", "steered_tokens", "doubts")
        point = {key: mean(arm[key] for arm in here) for key in means}
        single = here[0] if len(here) == 1 else None
        points.append(point | {"alpha0": alpha0, "gamma": here[0]["gamma"], "vectors": len(here), "arm": single})
    return points


def kind_of(arm: Mapping[str, Any]) -> str:
    """Which of `KINDS` a steered arm is."""
    if arm["vector"].startswith(RANDOM):
        return "random"
    if arm["policy"] != FULL:
        return "eviction"
    return "dynamic" if arm["gamma"] else "static"


def plain_arms(summary: Summary) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full KV and eviction, neither steered."""
    size = summary["run"]["settings"]["batch_sizes"][0]
    (budget,) = summary["run"]["budgets"].values()
    full, evicting = find(summary, FULL, 0, size), find(summary, OURS, budget, size)
    assert full is not None
    assert evicting is not None
    return full, evicting


# ---- the section of docs/results.md


def steering_section(summary: Summary, sweep: Mapping[str, Any] | None) -> list[str]:
    """Paragraphs in Markdown.

    Args:
        summary: contents of `steering.json`.
        sweep: contents of `steering-sweep.json`, if there.
    """
    vector = summary["vector"]
    counts = ", ".join(f"{vector[key]:,} {key}" for key in ("execution", "reflection", "transition"))
    parts = [
        "## Steering the bundled model, run here",
        "The bundled vector is the mean state before the model goes on (*Find*, *Done*) minus the mean state before it "
        f"doubts (*Wait*), from its own answers to training problems: {counts} thoughts, layer {vector['layer']} of "
        f"{vector['num_layers']}, norm {vector['norm']:.1f}, split-half cosine {vector['split_half_cosine']:.4f}. It "
        "is added alpha times at the end of each thought. *Static* is alpha = alpha0; *dynamic* adds gamma for each "
        "doubt so far. The model was trained on texts with fewer doubts too, so it knows how to leave them out; how "
        "much shorter the answers of another model become, this does not show.",
        setting(summary),
        *headline(summary),
        lowest(summary),
        f"![Length and accuracy against alpha0]({STEERING.parent}/{STEERING_FIGURE}.svg)",
        *(side_by_side(summary, alpha0) for alpha0 in summary["shown"]),
        "*Doubts* are sentences with *Wait*, *Alternatively* or *again*; *steered* are tokens that the vector was "
        "added to. Where no compaction is shown for eviction, the answers ended before there was anything to evict. "
        "Random vectors have the same norm and enter the same layer; their rows are means over the vectors.",
        "### All arms",
        arms_table(summary),
        NOTES,
    ]
    if sweep is not None:
        parts += sweep_part(sweep)
    return [*filter(None, parts), "### How it was made", provenance(summary)]


def headline(summary: Summary) -> list[str]:
    """Dynamic steering against none, with and without eviction, at the strengths that are shown."""
    full, _ = plain_arms(summary)
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
    return ["\n".join(lines)]


def lowest(summary: Summary) -> str:
    """Where steering goes worst together with eviction, in words."""
    worst = min(curve(summary, "eviction"), key=lambda point: point["accuracy"])
    return (
        "Not every strength goes well with eviction: "
        f"at alpha0 {worst['alpha0']:g} {100 * worst['accuracy']:.1f} % are right. Where the vector just suffices to "
        "end a doubt, the model may also find once more what it has found."
        if worst["accuracy"] < plain_arms(summary)[1]["accuracy"] - 0.01
        else ""
    )


def side_by_side(summary: Summary, alpha0: float) -> str:
    """All kinds at one strength."""
    full, evicting = plain_arms(summary)
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


def sweep_part(sweep: Mapping[str, Any]) -> list[str]:
    """How layer and strength were chosen."""
    plain, *cells = sweep["cells"]
    layers = sorted({cell["layer"] for cell in cells})
    strengths = sorted({cell["alpha0"] for cell in cells})
    by_place = {(cell["layer"], cell["alpha0"]): cell for cell in cells}
    rows = [(layer, *(_sweep_cell(by_place[layer, alpha0]) for alpha0 in strengths)) for layer in layers]
    return [
        "### Which layer",
        f"`skipkv extract-vector --layer auto` on {sweep['settings']['dev_problems']} dev problems, static: mean "
        f"length in tokens, and right answers in % where they are not {100 * plain['accuracy']:.0f}. Not steered: "
        f"{plain['mean_length']:,.0f} tokens. Every thought begins with the same state at the input of layer 0.",
        table(("layer", *(f"alpha0 {alpha0:g}" for alpha0 in strengths)), rows, left=0),
        f"![Length and accuracy by layer]({SWEEP.with_suffix('.svg')})",
        "`make vector` made the vector, this table and this figure.",
    ]


def _sweep_cell(cell: Mapping[str, Any]) -> str:
    wrong = "" if cell["accuracy"] == 1 else f" ({100 * cell['accuracy']:.0f} %)"
    return f"{cell['mean_length']:,.0f}{wrong}"


def read_section(docs: Path) -> list[str]:
    """The section of the files in a folder; [] where the evaluation was not run."""
    if not (docs / STEERING).exists():
        return []
    sweep = json.loads((docs / SWEEP).read_text()) if (docs / SWEEP).exists() else None
    return steering_section(json.loads((docs / STEERING).read_text()), sweep)
