"""Runs of the accuracy harness without an engine: order, resuming, and which runs count."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.accuracy import RunError, UsageError, checks, run
from benchmarks.accuracy.grid import Settings
from benchmarks.accuracy.run import Run, load
from benchmarks.accuracy.samples import SampleWriter, read_samples
from benchmarks.accuracy.summary import summarise
from tests.unit.benchmarks.accuracy.fakes import SETTINGS, FakePool, sample
from tests.unit.benchmarks.accuracy.test_settings import OWN, STEERED


def test_a_cut_off_line_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "results.jsonl"
    writer = SampleWriter(path)
    writer.write([sample(number=0), sample(number=1)])
    writer.close()
    with path.open("a") as file:
        file.write('{"policy": "ful')
    assert [s.number for s in read_samples(path)] == [0, 1]
    writer = SampleWriter(path)
    writer.write([sample(number=2)])
    writer.close()
    assert read_samples(path) == [sample(number=i) for i in range(3)]


def test_a_line_that_is_no_sample_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UsageError, match="line 1 is not a sample"):
        read_samples(path)


def test_full_runs_first_and_settles_the_budgets(pool, tmp_path):
    Run(SETTINGS, tmp_path, command=["x"])()
    assert {request.arm.policy for request in pool.asked[:6]} == {"full"}
    settings, info, samples = load(tmp_path)
    assert settings == SETTINGS
    assert info["budgets"] == {"25%": 250, "300": 300}
    assert info["full_mean_length"] == 1000
    assert info["complete"]
    assert info["failures"] == []
    assert len(samples) == 3 * 6 + 3 * 2
    assert all(s.correct for s in samples)


def test_each_engine_is_asked_for_its_policies(pool, tmp_path, monkeypatch):
    started = []

    class Recorded(FakePool):
        def __init__(self, settings: Settings, *rest: Any) -> None:
            super().__init__(settings, *rest)
            self.settings = settings

        def answers(self, shares):
            policies = {request.arm.policy for share in shares for request in share}
            started.append((policies, self.settings.policies, self.settings.protect_prompt))
            yield from super().answers(shares)

    monkeypatch.setattr(run, "Pool", Recorded)
    Run(replace(OWN, batch_sizes=(4,), problems_at={}), tmp_path)()
    assert started == [
        ({"full"}, ("full", "rkv"), True),
        ({"rkv"}, ("full", "rkv"), True),
        ({"trimkv"}, ("full", "trimkv"), True),
        ({"finch"}, ("full", "finch"), False),
    ]
    _, info, samples = load(tmp_path)
    assert info["failures"] == []
    assert len(samples) == 7 * 6


def test_steered_arms_are_run_and_kept(pool, tmp_path):
    Run(replace(STEERED, batch_sizes=(4,), problems_at={}), tmp_path)()
    settings, info, samples = load(tmp_path)
    assert info["failures"] == []
    # Full KV and two budgets, each with one kind of steering, and full KV once more.
    assert len(samples) == len({s.key for s in samples}) == 6 * (3 + 3 + 1)
    assert {s.steered_tokens for s in samples if s.steering} == {7}
    assert {s.steered_tokens for s in samples if not s.steering} == {0}
    summary = summarise(settings, info, samples)
    steered = [arm for arm in summary["arms"] if "steering" in arm]
    assert [(a["policy"], a["steering"], a["gamma"]) for a in steered] == [
        ("full", "v:1:0.02", 0.02),
        ("skipkv", "v:1:0.02", 0.02),
        ("skipkv", "v:1:0.02", 0.02),
        ("full", "v:0.5:0", 0.0),
    ]
    assert all((a["doubts"], a["steered_tokens"]) == (3, 7) for a in steered)
    assert all("difference_to_full" in a for a in steered)


def test_a_vector_that_was_never_added_fails(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "steered", 0)
    with pytest.raises(RunError, match="no token of any of 6 answers was steered"):
        Run(replace(STEERED, batch_sizes=(4,), problems_at={}), tmp_path)()


def test_a_steered_answer_may_end_before_it_is_compacted():
    settings = replace(STEERED, policies=("full", "skipkv"))
    short = sample(compactions=0, completion_tokens=80, steering="v:1:0", steered_tokens=5)
    assert not checks.failures([short], settings)
    (found,) = checks.failures([replace(short, steering="", steered_tokens=0)], settings)
    assert "full KV under another name" in found
    long = sample(compactions=0, completion_tokens=500, steering="v:1:0", steered_tokens=5)
    assert len(checks.failures([long], settings)) == 2


def test_seeds_are_the_same_in_every_arm(pool, tmp_path):
    Run(replace(SETTINGS, temperature=0.6, samples=2), tmp_path)()
    seeds = {(r.problem, r.number): set() for r in pool.asked}
    for request in pool.asked:
        seeds[request.problem, request.number].add(request.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len({seed for found in seeds.values() for seed in found}) == 12


@pytest.mark.parametrize("stop_after", [0, 1, 3, 6, 8, 19])
def test_a_stopped_run_goes_on_where_it_was(stop_after, pool, tmp_path):
    Run(SETTINGS, tmp_path / "whole")()
    pool.asked.clear()
    pool.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        Run(SETTINGS, tmp_path / "stopped")()
    with pytest.raises(UsageError, match="not complete"):
        load(tmp_path / "stopped")
    pool.stop_after = 10**9
    Run(SETTINGS, tmp_path / "stopped")()
    assert len(pool.asked) == len({(r.arm, r.problem, r.number) for r in pool.asked}) == 24
    whole, stopped = load(tmp_path / "whole"), load(tmp_path / "stopped")
    assert stopped[2] == whole[2]
    assert stopped[1]["budgets"] == whole[1]["budgets"]
    asked = len(pool.asked)
    Run(SETTINGS, tmp_path / "stopped")()
    assert len(pool.asked) == asked
    assert summarise(*load(tmp_path / "stopped"))["arms"] == summarise(*whole)["arms"]


def test_a_killed_run_goes_on_too(pool, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        # After a signal, only the files on disk remain.
        patch.setattr(Run, "_run_batch_size", lambda run, *_: shutil.copytree(run.out, killed, dirs_exist_ok=True))
        Run(SETTINGS, tmp_path / "run")()
    assert (killed / "results.jsonl").exists()
    Run(SETTINGS, killed)()
    assert len(load(killed)[2]) == 24


def test_a_resumed_run_must_be_the_same_run(pool, tmp_path, monkeypatch):
    Run(SETTINGS, tmp_path)()
    with pytest.raises(UsageError, match=r"(?s)other settings.*max_tokens: was 8192, is 100"):
        Run(replace(SETTINGS, max_tokens=100), tmp_path)
    with pytest.raises(UsageError, match="policies: skipkv must not be left out"):
        Run(replace(SETTINGS, policies=("full", "rkv")), tmp_path)
    Run(replace(SETTINGS, policies=("full", "skipkv", "rkv")), tmp_path)()
    assert {s.policy for s in load(tmp_path)[2]} == {"full", "skipkv", "rkv"}
    monkeypatch.setattr(run, "source", lambda *_: "edited")
    with pytest.raises(UsageError, match="source has other contents than before"):
        Run(SETTINGS, tmp_path)
    (tmp_path / "run_info.json").unlink()
    with pytest.raises(UsageError, match=r"has a results.jsonl but no run_info.json"):
        Run(SETTINGS, tmp_path)


def test_separate_arms_are_timed(pool, tmp_path):
    Run(replace(SETTINGS, separate_arms=True), tmp_path)()
    assert set(load(tmp_path)[1]["arm_seconds"]) == {
        f"{arm}, batch {size}" for size in (4, 1) for arm in ("full", "skipkv at 250", "skipkv at 300")
    }


def test_a_run_that_did_not_compact_fails(pool, tmp_path):
    pool.compactions = 0
    with pytest.raises(RunError, match="skipkv at 250, batch 4, dev-0, sample 0: no compaction"):
        Run(SETTINGS, tmp_path)()
    assert load(tmp_path)[1]["failures"]


def test_too_many_processes(pool, tmp_path):
    with pytest.raises(UsageError, match="--processes 10000 is out of range"):
        Run(SETTINGS, tmp_path, processes=10000)


def test_every_worker_has_its_share_of_the_problems(monkeypatch, tmp_path):
    seen = []

    class Recorder(FakePool):
        def answers(self, shares):
            seen.append([{request.problem for request in share} for share in shares])
            yield from super().answers(shares)

    monkeypatch.setattr(run, "Pool", Recorder)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1})
    Run(SETTINGS, tmp_path, processes=2)()
    assert seen[0] == [{"dev-0", "dev-2", "dev-4"}, {"dev-1", "dev-3", "dev-5"}]
    assert all(not (a & b) for a, b in seen)


def test_the_shortest_answer_that_must_compact():
    # bound = 100 + 128 = 228 tokens: the step that starts with 228 computed tokens compacts.
    long, short = sample(completion_tokens=170, compactions=0), sample(completion_tokens=169, compactions=0)
    assert checks.must_have_compacted(long, SETTINGS)
    assert not checks.must_have_compacted(short, SETTINGS)
    assert not checks.must_have_compacted(replace(long, policy="full"), SETTINGS)


def test_a_long_prompt_raises_the_bound():
    # prompt 300 + window 8 + buffer 128 = 436
    protected = sample(prompt_tokens=300, completion_tokens=137, compactions=0)
    assert not checks.must_have_compacted(protected, SETTINGS)
    assert checks.must_have_compacted(replace(protected, completion_tokens=138), SETTINGS)
    assert checks.must_have_compacted(protected, replace(SETTINGS, protect_prompt=False))


def test_failures():
    good = [sample(), sample(problem="dev-1", completion_tokens=20, compactions=0)]
    assert checks.failures(good, SETTINGS) == []
    assert "full KV reports 3" in checks.failures([sample(policy="full", budget=0)], SETTINGS)[0]
    # Longer than the budget on average, but below the bound: no compaction was due.
    (text,) = checks.failures([sample(completion_tokens=100, compactions=0)], SETTINGS)
    assert "no compaction in any of 1 answers" in text
    assert checks.failures([sample(budget=400, completion_tokens=100, compactions=0)], SETTINGS) == []
    assert "and 5 more" in checks.describe([str(i) for i in range(15)])
