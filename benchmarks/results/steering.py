"""The arms of the steering evaluation by kind, for its table and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from skipkv_vllm.evaluation.figures import FULL, OURS

from .arms import find
from .store import Summary

RANDOM = "random-"
"""What the names of random vectors begin with."""

KINDS = {
    "static": "static",
    "dynamic": "dynamic",
    "eviction": f"dynamic, with {OURS}",
    "random": "random vectors, dynamic",
}
"""Ways to steer that are compared -> their names in tables and figures."""


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


def unsteered(summary: Summary) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full KV and eviction, neither steered."""
    size = summary["run"]["settings"]["batch_sizes"][0]
    (budget,) = summary["run"]["budgets"].values()
    full, evicting = find(summary, FULL, 0, size), find(summary, OURS, budget, size)
    assert full is not None
    assert evicting is not None
    return full, evicting
