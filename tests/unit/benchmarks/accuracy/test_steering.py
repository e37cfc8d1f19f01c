"""The steering evaluation with a made-up run: its arms, random vectors, curves and section of the docs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.grid import Arm, Settings
from benchmarks.accuracy.report import markdown, print_table
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.steering import describe_vector, random_vectors, ways_to_steer
from benchmarks.accuracy.summary import summarise
from benchmarks.results.pages import publish
from benchmarks.results.plots.steering import draw_steering
from benchmarks.results.sections.steering import FIGURE, layer_section, lowest, side_by_side, steering_section
from benchmarks.results.steering import curve
from benchmarks.results.store import DOCS, RESULTS, STEERING, SWEEP, TINY
from skipkv_vllm import bundled_model, bundled_vector
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.steering.extraction.checkpoints import open_checkpoint
from tests.harness import REPOSITORY
from tests.unit.benchmarks.accuracy.test_report import INFO, SETTINGS, made_up, made_up_samples

RANDOM = ("random-0", "random-1")
STEERED = replace(
    SETTINGS,
    policies=("full", "skipkv"),
    budgets=("25%",),
    batch_sizes=(4,),
    problems_at={},
    vectors={"bundled": "b", "random-0": "r", "random-1": "s"},
    steering=tuple(ways_to_steer((0.5, 1.0), 0.02, RANDOM, (1.0,))),
)
LENGTHS = {("bundled", 0.5): 800, ("bundled", 1.0): 400, ("random-0", 1.0): 1000, ("random-1", 1.0): 1200}


def sample(settings: Settings, arm: Arm, number: int) -> Sample:
    plain = made_up(arm.policy, arm.budget, arm.batch_size, number)
    if not arm.steering:
        return plain
    vector, alpha0, _ = arm.steering.split(":")
    length = LENGTHS[vector, float(alpha0)]
    counts = {"steered_tokens": 20, "execution": 9, "reflection": 3, "transition": 1}
    return replace(plain, steering=arm.steering, completion_tokens=length, **counts)


@pytest.fixture
def summary():
    info = INFO | {"budgets": {"25%": 250}, "settings": STEERED.to_json()}
    arms = [Arm("full", 0, 4), *STEERED.arms(4, [250])]
    samples = [sample(STEERED, arm, i) for arm in arms for i in range(12)]
    found = summarise(STEERED, info, samples)
    return json.loads(json.dumps(found | {"vector": describe_vector(bundled_vector()), "shown": [1.0]}))


def test_the_arms():
    assert list(STEERED.steering) == [
        *("full/bundled:0.5:0", "full/bundled:1:0"),
        *("full/bundled:0.5:0.02", "full/bundled:1:0.02"),
        *("skipkv/bundled:0.5:0.02", "skipkv/bundled:1:0.02"),
        *("full/random-0:1:0.02", "full/random-1:1:0.02"),
    ]


def test_random_vectors_have_the_norm_and_nothing_else(tmp_path):
    bundled = SteeringVector.load(bundled_vector())
    files = random_vectors(bundled, 3, tmp_path)
    drawn = [SteeringVector.load(file) for file in files.values()]
    assert list(files) == ["random-0", "random-1", "random-2"]
    for vector in drawn:
        assert vector.norm == pytest.approx(bundled.norm, rel=1e-5)
        assert (vector.layer, vector.num_layers) == (bundled.layer, bundled.num_layers)
        assert vector.execution is None
    directions = torch.stack([v.values / v.norm for v in [bundled, *drawn]])
    assert (directions @ directions.T - torch.eye(4)).abs().max() < 0.4
    again = random_vectors(bundled, 1, tmp_path)
    assert torch.equal(SteeringVector.load(again["random-0"]).values, drawn[0].values)


def test_curves(summary):
    lengths = {kind: [p["mean_length"] for p in curve(summary, kind)] for kind in ("static", "dynamic", "eviction")}
    assert lengths == {"static": [800, 400], "dynamic": [800, 400], "eviction": [800, 400]}
    (random,) = curve(summary, "random")
    assert (random["alpha0"], random["mean_length"], random["vectors"], random["arm"]) == (1.0, 1100, 2, None)


def test_side_by_side(summary):
    rows = side_by_side(summary, 1.0).split("\n")[4:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], *row[2:4]) for row in cells] == [
        ("none", "1,017", "+0.0"),
        ("none, with skipkv", "1,017", "+0.0"),
        ("static", "400", "-60.7"),
        ("dynamic", "400", "-60.7"),
        ("dynamic, with skipkv", "400", "-60.7"),
        ("random vectors, dynamic (mean of 2)", "1,100", "+8.2"),
    ]
    # Doubts, tokens steered, compactions.
    assert [row[5:] for row in cells][2:5] == [["4.0", "20.0", "0.0"], ["4.0", "20.0", "0.0"], ["4.0", "20.0", "5.0"]]
    assert cells[1][5:] == ["", "", "5.0"]


def test_the_section(summary):
    cells = [(None, 0, 1.0, 1000, 0)] + [(layer, a, 0.9, 1000 / a, 0) for layer in (1, 2) for a in (0.5, 1.0)]
    names = ("layer", "alpha0", "accuracy", "mean_length", "truncated")
    sweep = {"settings": {"dev_problems": 8}, "cells": [dict(zip(names, values, strict=True)) for values in cells]}
    text = "\n".join([*steering_section(summary), *layer_section(sweep)])
    assert "answers 61 % shorter than with full KV and no steering (400 instead of 1,017 tokens)" in text
    assert "| 1 | 2,000 (90 %) | 1,000 (90 %) |" in text
    assert "bundled:0.5:0.02" in text


def test_a_strength_that_costs_accuracy_with_eviction_is_named(summary):
    assert lowest(summary) == ""
    for arm in summary["arms"]:
        if arm["policy"] == "skipkv" and arm.get("alpha0") == 0.5:
            arm["accuracy"] = 0.75
    assert "at alpha0 0.5, 75.0 % are right" in lowest(summary)


def test_reports_name_the_steering(summary):
    assert "| tokens steered | doubts |" in markdown(summary, {})
    lines: list[str] = []
    print_table(summary, lines.append)
    assert "steered by bundled:0.5:0.02:" in lines


def test_the_figure(summary, tmp_path):
    draw_steering(summary, tmp_path / "figure")
    draw_steering(summary, tmp_path / "again")
    assert (tmp_path / "figure.svg").read_text() == (tmp_path / "again.svg").read_text()
    assert (tmp_path / "figure.png").exists()


def test_the_page_has_the_section_where_it_was_run(summary, tmp_path):
    plain = summarise(SETTINGS, INFO, made_up_samples())
    page = tmp_path / RESULTS / "accuracy.md"
    publish(plain, tmp_path / TINY, tmp_path)
    assert "## Steering" not in page.read_text()
    publish(summary, tmp_path / STEERING, tmp_path)
    assert json.loads((tmp_path / STEERING).read_text()) == summary
    assert "## Steering the bundled model" in page.read_text()


@pytest.mark.parametrize("pair", ["v", "=f", "v="])
def test_bad_vectors(pair, capsys, tmp_path):
    code = main(
        ["run", "--model", "m", "--data", "tiny", "--out", str(tmp_path / "o"), "--steering-vectors", pair, "w=f"]
    )
    assert code == 2
    assert "write NAME=FILE" in capsys.readouterr().err


# ---- the recorded run


def test_the_bundled_vector_belongs_to_the_bundled_model():
    checkpoint = open_checkpoint(bundled_model())
    vector = SteeringVector.load(bundled_vector())
    vector.check_fits(checkpoint.hidden_size, checkpoint.num_layers, checkpoint.tokenizer_sha)
    assert json.loads(vector.keyword_set) == json.loads(
        (REPOSITORY / "benchmarks/tiny_reasoner/thoughts.json").read_text()
    )


@pytest.mark.skipif(not (REPOSITORY / DOCS / STEERING).exists(), reason="no results yet: make eval-steering")
def test_what_the_results_show():
    """Target: dynamic steering makes answers to held-out problems 15 % shorter and at most one point less accurate."""
    summary = json.loads((REPOSITORY / DOCS / STEERING).read_text())
    assert summary["run"]["settings"]["split"] == "held-out"
    full = summary["arms"][0]
    shown = {
        kind: [p for p in curve(summary, kind) if p["alpha0"] in summary["shown"]] for kind in ("dynamic", "eviction")
    }
    good = {
        kind: [
            p["mean_length"] <= 0.85 * full["mean_length"] and p["accuracy"] >= full["accuracy"] - 0.01 for p in points
        ]
        for kind, points in shown.items()
    }
    assert len(good["dynamic"]) == len(summary["shown"])
    assert all(good["dynamic"])
    assert any(good["eviction"])
    assert summary["vector"]["norm"] == pytest.approx(SteeringVector.load(bundled_vector()).norm)
    assert (REPOSITORY / DOCS / SWEEP).exists()
    assert (REPOSITORY / DOCS / RESULTS / f"{FIGURE}.svg").exists()
