"""Unequal budgets for layers and heads, in a dense reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skipkv_vllm.evaluation.stats import paired_difference

from ..markdown import table
from ..provenance import made_by

ALL = "all"
WORTH = 2.0
"""Points of accuracy, fixed before the first run, from which unequal budgets would be worth tables of their own."""


def unequal_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section.

    Args:
        figures: what `python -m benchmarks.unequal_budgets` wrote.
    """
    settings, full = figures["run"]["settings"], figures["full"]
    return [
        "## Unequal budgets for layers and heads, in a dense reference",
        "A block table holds the same number of tokens for every layer and head. These figures show what it would be "
        "worth to divide the same total differently. `adakv` divides by head: the best tokens of a layer stay, "
        "whichever head they belong to, and no head falls below 0.2 of its equal share. `epicache` divides by layer, "
        "with the exponent in its name: layers whose keys depend more on distant text get more, and none falls below "
        "a quarter of its equal share. Prompt and window stay in every head; only the rest is divided. The bundled "
        f"model ran in Hugging Face's code with a dense cache on {settings['problems']} dev problems, of which full "
        f"KV solves {full['accuracy']:.0%}; the profile of `epicache` was taken on {settings['train']} training "
        "problems. Gains are in points against equal budgets, with 95 % intervals of the paired bootstrap over "
        "problems.",
        unequal_table(figures),
        profile_table(figures),
        verdict(figures),
        made_by(figures["run"]),
    ]


def again_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about a run on other problems with what was best in the first run."""
    settings = figures["run"]["settings"]
    return [
        "### Again, on other problems",
        "The best of several candidates looks better than it is. The best one above was therefore run once more, on "
        f"{settings['problems']} further dev problems, from the {settings['skip'] + 1}st on.",
        unequal_table(figures),
        verdict(figures),
        made_by(figures["run"]),
    ]


def gains(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each way to divide with equal budgets, in points, paired by problem.

    Returns:
        A row over all methods and budgets, one for each method, and one for each method and budget.
    """
    found = []
    for name in dict.fromkeys(arm["shares"] for arm in arms):
        ours = [arm for arm in arms if arm["shares"] == name]
        groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for arm in ours:
            for key in (ALL, ALL), (arm["base"], ALL), (arm["base"], arm["budget"]):
                groups.setdefault(key, []).append(arm)
        for (base, budget), these in groups.items():
            cells = [(arm["base"], arm["budget"]) for arm in these]
            those = [arm for arm in arms if arm["shares"] == "equal" and (arm["base"], arm["budget"]) in cells]
            right, equal = (np.array([arm["correct"] for arm in group]).mean(axis=0) for group in (these, those))
            gain = paired_difference(right.tolist(), equal.tolist())
            row = {"shares": name, "base": base, "budget": budget, "accuracy": float(right.mean())}
            found.append(row | {"gain": 100 * gain.value, "low": 100 * gain.low, "high": 100 * gain.high})
    return found


def unequal_table(figures: Mapping[str, Any]) -> str:
    """A row per method and budget, a column per way to divide."""
    rows = gains(figures["arms"])
    names = list(dict.fromkeys(row["shares"] for row in rows))
    cells = {(row["base"], row["budget"], row["shares"]): row for row in rows}
    lines = []
    bases = list(dict.fromkeys(row["base"] for row in rows))
    pairs = dict.fromkeys((row["base"], row["budget"]) for row in rows)
    for base, budget in sorted(pairs, key=lambda pair: bases.index(pair[0])):
        equal = f"{100 * cells[base, budget, 'equal']['accuracy']:.1f}"
        lines.append([base, budget, equal, *(_gain(cells[base, budget, name]) for name in names[1:])])
    return table(("method", "budget", "equal, % right", *names[1:]), lines, 2)


def profile_table(figures: Mapping[str, Any]) -> str:
    """The similarity of each layer, and the weights that follow from it."""
    rows = figures["profile"]
    return table(list(rows[0]), [[row["layer"], *(f"{row[key]:.3f}" for key in list(row)[1:])] for row in rows])


def verdict(figures: Mapping[str, Any]) -> str:
    """Apply the rule that was fixed before the run."""
    unequal = [row for row in gains(figures["arms"]) if row["shares"] != "equal"]
    overall, cells = [row for row in unequal if row["base"] == ALL], [row for row in unequal if row["budget"] != ALL]
    mean = "; ".join(f"`{row['shares']}` {_gain(row)}" for row in overall)
    single = [row for row in cells if _is_worth(row)]
    found = ", ".join(
        f"`{row['shares']}` with `{row['base']}` at {row['budget']} ({row['gain']:+.1f})" for row in single
    )
    return (
        f"**The rule, fixed before the run**: block tables by layer or head are worth building from {WORTH:g} points "
        "on, if the interval is above 0. Over all methods and budgets the rule is "
        f"{'met' if any(map(_is_worth, overall)) else 'not met'}: {mean}. Of {len(cells)} single cells {len(single)} "
        f"meet it{f' ({found})' if found else ''}; in {sum(row['high'] < 0 for row in cells)} the interval is below 0, "
        "so equal budgets are better."
    )


def _is_worth(row: Mapping[str, Any]) -> bool:
    return bool(row["gain"] >= WORTH and row["low"] > 0)


def _gain(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{round(row[key], 1) + 0.0:+.1f}" for key in ("gain", "low", "high"))  # no -0.0
    return f"{value} [{low}, {high}]"
