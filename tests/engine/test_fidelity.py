"""`skipkv fidelity` end to end: exactly nothing is lost with a budget beyond the text, and something below it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.texts import solutions
from benchmarks.tiny_reasoner.problems import problems
from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation import command
from tests.real_models import real_model


def fidelity(out: Path, *words: str) -> dict:
    assert command.main("skipkv fidelity", ["--out", str(out), *words]) == 0
    return json.loads((out / "fidelity.json").read_text())


def test_excess_is_zero_with_a_budget_beyond_the_text_and_positive_below(tmp_path):
    rows = [{"text": f"{each.question}\n\n{each.completion}"} for each in problems("dev", 3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = fidelity(
        tmp_path / "out",
        *("--model", str(bundled_model()), "--texts", str(tmp_path / "texts.jsonl")),
        *("--length", "400", "--budgets", "400", "100", "--buffer", "32", "--methods", "skipkv", "rkv", "random"),
        *("--policy-config", '{"random": {"sinks": 16}}', "--engine", '{"dtype": "float32", "block_size": 32}'),
    )
    for row in report["rows"]:
        if row["budget"] == 400:
            assert (row["excess"], row["divergence"], row["agreement"], row["compactions"]) == (0, 0, 1, 0), row
        else:
            # Compacted at 132 tokens, then every 32.
            assert row["compactions"] == 1 + (399 - 132) // 32
            assert row["excess"] > 0
            assert row["divergence"] > 0
            assert row["agreement"] < 1
            assert len(row["by_distance"]) == 16


def test_a_real_model(tmp_path):
    model = real_model("smollm2")
    (tmp_path / "text.txt").write_text(solutions(0))
    report = fidelity(
        tmp_path / "out",
        *("--model", str(model), "--texts", str(tmp_path / "text.txt"), "--length", "384", "--max-texts", "1"),
        *("--budgets", "384", "96", "--buffer", "64", "--methods", "snapkv"),
    )
    # The logarithm of the vocabulary is 10.8, and a model that was converted wrongly is hardly below.
    assert 0.5 < report["full_nll"] < 3
    whole, small = report["rows"]
    assert whole["excess"] == 0
    assert 0 < small["excess"] < 1
