"""The section of `docs/results.md` about unequal budgets, made of `docs/results/unequal-budgets.json`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

UNEQUAL = Path("results", "unequal-budgets.json")
WORTH = 2.0
"""Points of accuracy, fixed before the first run, from which unequal budgets would be worth tables of their own."""


def unequal_section(figures: Mapping[str, Any]) -> list[str]:
    """Paragraphs in Markdown.

    Args:
        figures: what `python -m benchmarks.unequal_budgets` wrote.
    """
    run, full = figures["run"], figures["full"]
    settings, machine = run["settings"], run["machine"]
    return [
        "## Unequal budgets for layers and heads, in a dense reference",
        "A block table holds equally many tokens of every layer and head. This is what it would be worth to share the "
        "same total differently: `adakv` by head (the best tokens of a layer stay, whichever head they are of; no head "
        "falls below 0.2 of its equal share), `epicache` by layer, with its exponent (layers whose keys depend more on "
        "the text far back get more; none falls below a quarter of its equal share). Prompt and window stay in every "
        "head; the rest is shared out. The bundled model in Hugging Face's code with a dense cache, "
        f"{settings['problems']} dev problems, of which full KV solves {full['accuracy']:.0%}; the profile of "
        f"`epicache` is of {settings['train']} training problems. Gains are in points against equal budgets, with 95 % "
        "intervals of the paired bootstrap over problems.",
        unequal_table(figures),
        profile_table(figures),
        verdict(figures),
        f"Made by `{shlex.join(run['command'])}` at commit `{run['commit']}`, on {machine['cores']} cores of "
        f"{machine['cpu']}.",
    ]


def unequal_table(figures: Mapping[str, Any]) -> str:
    """A row per base and budget, a column per way to share."""
    rows = figures["gains"]
    names = list(dict.fromkeys(row["shares"] for row in rows))
    cells = {(row["base"], row["budget"], row["shares"]): row for row in rows}
    lines = []
    for base, budget in dict.fromkeys((row["base"], row["budget"]) for row in rows):
        equal = f"{100 * cells[base, budget, 'equal']['accuracy']:.1f}"
        lines.append([base, budget, equal, *(_gain(cells[base, budget, name]) for name in names[1:])])
    return table(("method", "budget", "equal, % right", *names[1:]), lines, 2)


def profile_table(figures: Mapping[str, Any]) -> str:
    """The profile and the weights that follow from it."""
    rows = figures["profile"]
    return table(list(rows[0]), [[row["layer"], *(f"{row[key]:.3f}" for key in list(row)[1:])] for row in rows])


def verdict(figures: Mapping[str, Any]) -> str:
    """What the rule says."""
    unequal = [row for row in figures["gains"] if row["shares"] != "equal"]
    overall, cells = ([row for row in unequal if (row["base"] == "all") == whole] for whole in (True, False))
    mean = "; ".join(f"`{row['shares']}` {_gain(row)}" for row in overall)
    single = [row for row in cells if _is_worth(row)]
    found = ", ".join(
        f"`{row['shares']}` with `{row['base']}` at {row['budget']} ({row['gain']:+.1f})" for row in single
    )
    return (
        f"**The rule, fixed before the run**: tables by layer or head are worth building from {WORTH:g} points on, "
        "with an interval above 0. Over all methods and budgets it is "
        f"{'met' if any(map(_is_worth, overall)) else 'not met'}: {mean}. Of {len(cells)} single cells it is met in "
        f"{len(single)}{f' ({found})' if found else ''}; {sum(row['high'] < 0 for row in cells)} are worse than equal "
        "budgets by an interval below 0."
    )


def _is_worth(row: Mapping[str, Any]) -> bool:
    return bool(row["gain"] >= WORTH and row["low"] > 0)


def _gain(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{round(row[key], 1) + 0.0:+.1f}" for key in ("gain", "low", "high"))  # no -0.0
    return f"{value} [{low}, {high}]"
