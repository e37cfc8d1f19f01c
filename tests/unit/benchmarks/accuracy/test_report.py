"""Statistics against hand-computed numbers; summary, figures and report of a made-up run."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as command_line
from benchmarks.accuracy.grid import Settings
from benchmarks.accuracy.report import html, markdown, print_table, write_report
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.summary import changed_answers, peak_tokens, summarise
from benchmarks.results.arms import find
from benchmarks.results.store import PAPER, Summary
from skipkv_vllm.evaluation.figures import spread
from skipkv_vllm.evaluation.stats import mcnemar, paired_difference, wilson

PROG = "python -m benchmarks.accuracy"

# ---- statistics


def test_wilson_against_published_values():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29, without continuity correction.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20).high == 1.0


def test_mcnemar_by_hand():
    assert mcnemar([1, 1, 0, 0], [1, 1, 0, 0]) == 1.0
    # Six problems that only one of the two solved, always the same one: 2 * (1/2)**6.
    assert mcnemar([1] * 6 + [0], [0] * 6 + [0]) == pytest.approx(2 / 64)
    # Two to eight of ten: 2 * (1 + 10 + 45) / 1024.
    assert mcnemar([1] * 2 + [0] * 8, [0] * 2 + [1] * 8) == pytest.approx(112 / 1024)
    assert mcnemar([1, 0], [0, 1]) == 1.0


def test_paired_difference():
    assert paired_difference([1, 1, 1], [0, 0, 0]) == (1.0, 1.0, 1.0)
    ours, theirs = [1] * 150 + [0] * 50, [1] * 140 + [0] * 60
    value, low, high = paired_difference(ours, theirs)
    assert value == pytest.approx(0.05)
    # 10 of 200 differ, all in one direction: the standard error is sqrt(0.05 * 0.95 / 200).
    spread_of_mean = 1.96 * math.sqrt(0.05 * 0.95 / 200)
    assert (low, high) == pytest.approx((0.05 - spread_of_mean, 0.05 + spread_of_mean), abs=0.006)
    assert paired_difference(ours, theirs) == (value, low, high)


def test_labels_keep_their_distance_and_order():
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    moved = spread([0.9, 0.91, 0.92, 0.93], 0.05)
    assert [b - a for a, b in itertools.pairwise(moved)] == pytest.approx([0.05] * 3)
    assert sum(moved) / 4 == pytest.approx(0.915)


# ---- a made-up run

SETTINGS = Settings(
    model="models/made-up",
    data="tiny",
    policies=("full", "skipkv", "rkv"),
    budgets=("25%", "40%"),
    batch_sizes=(4, 1),
    problems=12,
    problems_at={1: 2},
)
INFO = {
    "command": ["python", "-m", "benchmarks.accuracy", "tiny"],
    "commit": "0123abc",
    "date": "2026-01-01",
    "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 8, "gpus": [], "processes": 2},
    "versions": {"python": "3.11", "vllm": "0.32"},
    "settings": SETTINGS.to_json(),
    "sessions": [{"seconds": 50, "samples": 40}, {"seconds": 70, "samples": 30}],
    "arm_seconds": {},
    "budgets": {"25%": 250, "40%": 400},
    "full_mean_length": 1000.0,
    "kv_bytes_per_token": 1024,
}


def made_up(policy: str, budget: int, batch_size: int, number: int) -> Sample:
    """rkv misses problems 0 and 1, every arm misses the last one; missed answers to problem 1 are cut off."""
    right = number != 11 and not (policy == "rkv" and number < 2)
    return Sample(
        policy=policy,
        budget=budget,
        batch_size=batch_size,
        problem=f"held-out-{number}",
        number=0,
        prompt_tokens=60,
        completion_tokens=1000 if right else 1200,
        finish_reason="length" if not right and number == 1 else "stop",
        compactions=5 if budget else 0,
        evicted_tokens=640 if budget else 0,
        tokens_digest="odd" if (policy, batch_size, number) == ("rkv", 1, 1) else "d",
        answer="7" if right else None,
        correct=right,
        text="...",
    )


def made_up_samples() -> list[Sample]:
    cells = [("full", 0)] + [(policy, budget) for policy in ("rkv", "skipkv") for budget in (400, 250)]
    counts = ((1, 2), (4, 12))
    return [made_up(*cell, size, i) for size, count in counts for i in reversed(range(count)) for cell in cells]


@pytest.fixture
def summary() -> Summary:
    return json.loads(json.dumps(summarise(SETTINGS, INFO, made_up_samples())))


def test_the_figures_of_an_arm(summary):
    assert summary["problems"] == [f"held-out-{i}" for i in range(12)]
    assert len(summary["arms"]) == 10
    arm = find(summary, "rkv", 250, 4)
    assert arm["accuracy"] == pytest.approx(9 / 12)
    assert arm["accuracy_interval"] == pytest.approx(list(wilson(9, 12)))
    assert arm["correct"] == [0, 0] + [1] * 9 + [0]
    assert arm["lengths"] == [1200] * 2 + [1000] * 9 + [1200]
    assert arm["mean_length"] == 1050
    assert arm["truncated"] == pytest.approx(1 / 12)
    assert arm["compactions"] == 5
    assert arm["budget_as_given"] == "25%"
    assert arm["mean_peak_tokens"] == 378  # budget 250 + buffer 128
    assert arm["bound_bytes"] == 4 * 378 * 1024
    assert arm["difference_to_full"]["value"] == pytest.approx(-2 / 12)
    assert arm["difference_to_full"]["mcnemar_p"] == pytest.approx(0.5)
    assert arm["length_to_full"]["value"] == pytest.approx(400 / 12)
    full = find(summary, "full", 0, 4)
    assert full["bound_bytes"] == 4 * 1260 * 1024
    assert "difference_to_full" not in full
    assert find(summary, "h2o", 250, 4) is None
    assert summary["run"]["seconds"] == 120


def test_paired_statistics_can_be_computed_again(summary):
    rkv, full = find(summary, "rkv", 250, 4), find(summary, "full", 0, 4)
    again = paired_difference(rkv["correct"], full["correct"])._asdict() | {
        "mcnemar_p": mcnemar(rkv["correct"], full["correct"])
    }
    assert again == pytest.approx(rkv["difference_to_full"])


def test_peak_tokens():
    short = replace(made_up("rkv", 250, 4, 3), completion_tokens=100, compactions=0)
    assert peak_tokens(short, SETTINGS) == 160
    assert peak_tokens(replace(short, prompt_tokens=900, completion_tokens=500, compactions=3), SETTINGS) == 1036


def test_what_the_batch_size_changed(summary):
    rows = {(row["policy"], row["budget"]): row for row in summary["batch_invariance"]}
    assert len(rows) == 5
    assert rows["skipkv", 250] == {
        "policy": "skipkv",
        "budget": 250,
        "batch_sizes": [4, 1],
        "compared": 2,
        "other_tokens": 0,
        "other_answer": 0,
    }
    assert (rows["rkv", 250]["other_tokens"], rows["rkv", 250]["other_answer"]) == (1, 0)


def test_a_changed_answer_fails_where_it_must_not(monkeypatch, tmp_path, capsys):
    samples = made_up_samples()
    changed = [
        replace(s, answer="8") if (s.policy, s.batch_size, s.problem) == ("skipkv", 1, "held-out-0") else s
        for s in samples
    ]
    summary = summarise(SETTINGS, INFO, changed)
    monkeypatch.setattr(command_line, "read_run", lambda _: summary)
    text = "".join(f"skipkv {at}: 1 of 2 answers differ between batch sizes 4 and 1\n" for at in (250, 400))
    for words, status, said in (([], 0, text), (["--require-batch-invariance"], 1, f"{PROG}: error: {text}")):
        assert command_line.main(["report", str(tmp_path), *words]) == status
        assert capsys.readouterr().err == said
    assert changed_answers(summarise(SETTINGS, INFO, samples)) == []


def test_several_samples_of_a_problem():
    settings = replace(SETTINGS, samples=2, temperature=0.6)
    samples = [replace(s, number=k) for s in made_up_samples() for k in range(2)]
    arm = find(summarise(settings, INFO, samples), "rkv", 250, 4)
    assert arm["correct"] == [0, 0] + [2] * 9 + [0]
    assert arm["difference_to_full"]["mcnemar_p"] is None
    low, high = arm["accuracy_interval"]
    assert low < 0.75 < high


def test_the_report(summary, tmp_path):
    page = write_report(summary, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| rkv | 250 (25%) | 4 | 12 | 75.0 [46.8, 91.1] | -16.7 [-41.7, +0.0] | 0.5 |" in text
    assert "skipkv at 250 (25%)" in text
    assert "10 answers were generated at two batch sizes: 0 have another answer, 2 differ in any token." in text
    assert "python -m benchmarks.accuracy tiny" in text
    for name in ("accuracy", "length", "memory"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    shown = page.read_text()
    assert shown.count("<svg") == 3
    assert "<img" not in shown
    assert "<table>" in shown
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_report_is_deterministic(summary, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_report(summary, tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_time_of_an_arm_is_shown(summary):
    assert "answers a minute" not in markdown(summary, {})
    timed = summarise(SETTINGS, INFO | {"arm_seconds": {"rkv at 250, batch 4": 6.0}}, made_up_samples())
    assert "answers a minute" in markdown(timed, {})
    assert "| 120.0 |" in markdown(timed, {})


def test_a_run_without_full_kv_or_skipkv():
    settings = replace(SETTINGS, policies=("rkv",), budgets=("250", "400"))
    info = INFO | {"budgets": {"250": 250, "400": 400}, "full_mean_length": None, "settings": settings.to_json()}
    text = markdown(summarise(settings, info, made_up_samples()), {})
    assert "| rkv | 250 | 4 | 12 | 75.0 [46.8, 91.1] |  |  |" in text
    assert "against the others" not in text


def test_the_table_for_a_terminal(summary):
    lines: list[str] = []
    print_table(summary, lines.append)
    text = "\n".join(lines).split("\n")
    assert len(text) == 12
    assert len({len(line) for line in text}) == 1


def test_html_escapes():
    assert "<script>" not in html("# t\n\n`<script>`", Path())


# ---- published figures


def test_published_tables_are_whole_and_their_commands_parse():
    parser = command_line._parser()
    for table in json.loads(PAPER.read_text())["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
        folders = set()
        for command in table["command"].splitlines():
            words = shlex.split(command)
            assert words[:3] == ["python", "-m", "benchmarks.accuracy"]
            args = parser.parse_args(words[3:])
            assert args.model.startswith("deepseek-ai/DeepSeek-R1-Distill-")
            assert args.out not in folders, "runs with other settings must use other folders"
            folders.add(args.out)
