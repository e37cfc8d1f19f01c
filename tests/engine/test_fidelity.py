"""`skipkv fidelity` end to end: a budget beyond the text loses exactly nothing, and a smaller one loses something."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.texts import solutions
from benchmarks.tiny_reasoner.problems import problems
from skipkv_vllm import bundled_model
from skipkv_vllm.cli import tune
from skipkv_vllm.evaluation import command
from tests.real_models import real_model


def fidelity(out: Path, *words: str) -> dict:
    assert command.main("skipkv fidelity", ["--out", str(out), *words]) == 0
    return json.loads((out / "fidelity.json").read_text())


def check_tune_takes_what_is_there(out: Path, words: Sequence[str], rows: Sequence[dict]) -> None:
    """`skipkv tune` into the same folder needs no engine, and its two halves together agree with `rows`."""
    logs = {path: path.stat().st_size for path in out.glob("*.log")}
    assert tune.main("skipkv tune", ["--out", str(out), *words, "--max-excess", "99"]) == 0
    assert {path: path.stat().st_size for path in out.glob("*.log")} == logs
    report = json.loads((out / "tune.json").read_text())
    chosen, reported = report["chosen"], report["reported"]
    assert chosen["request_bytes"] == min(row["request_bytes"] for row in report["rows"])
    (whole,) = (row for row in rows if (row["method"], row["budget"]) == (chosen["method"], chosen["budget"]))
    total = sum(half["excess"] * half["texts"] for half in (chosen, reported))
    assert total / whole["texts"] == pytest.approx(whole["excess"])


def test_excess_is_zero_with_a_budget_beyond_the_text_and_positive_below(tmp_path):
    rows = [{"text": f"{each.question}\n\n{each.completion}"} for each in problems("dev", 3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        *("--model", str(bundled_model()), "--texts", str(tmp_path / "texts.jsonl")),
        *("--length", "400", "--buffer", "32", "--methods", "skipkv", "rkv", "random"),
        *("--policy-config", '{"random": {"sinks": 16}}', "--engine", '{"dtype": "float32", "block_size": 32}'),
    ]
    report = fidelity(tmp_path / "out", *words, "--budgets", "400", "100")
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
    check_tune_takes_what_is_there(tmp_path / "out", [*words, "--budgets", "100"], report["rows"])


def test_a_real_model(tmp_path):
    model = real_model("smollm2")
    (tmp_path / "text.txt").write_text(solutions(0))
    report = fidelity(
        tmp_path / "out",
        *("--model", str(model), "--texts", str(tmp_path / "text.txt"), "--length", "384", "--max-texts", "1"),
        *("--budgets", "384", "96", "--buffer", "64", "--methods", "snapkv"),
    )
    # The logarithm of the vocabulary is 10.8; a wrongly converted model would hardly be below it.
    assert 0.5 < report["full_nll"] < 3
    whole, small = report["rows"]
    assert whole["excess"] == 0
    assert 0 < small["excess"] < 1
