"""A run of the fidelity evaluation with fake engines: order, resuming, and causes of failure."""

from __future__ import annotations

import pytest

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.engine import Setup, with_fair_random
from skipkv_vllm.evaluation.fidelity import Fidelity
from skipkv_vllm.evaluation.store import Store
from tests.unit.evaluation.fakes import SETUP, TEXTS, Engines


def test_what_is_missing_runs_and_full_kv_comes_first(tmp_path):
    engines = Engines()
    report = Fidelity(SETUP, ["rkv", "snapkv"], [20, 30], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs[:3]] == ["full"] * 3
    assert len(engines.jobs) == 3 * (1 + 2 * 2)
    assert engines.groups == [["rkv", "snapkv"]]
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    assert set(rows) == {("rkv", 20), ("snapkv", 20), ("rkv", 30), ("snapkv", 30)}
    assert rows["rkv", 20]["excess"] == pytest.approx(0.1, abs=1e-5)
    assert rows["rkv", 20]["positions"] == 3 * (59 - 28)

    # Everything is stored; only another method and budget run.
    assert Fidelity(SETUP, ["rkv", "snapkv"], [20, 30], TEXTS, tmp_path, engines)() == report
    assert len(engines.jobs) == 15
    Fidelity(SETUP, ["rkv", "tova"], [20, 40], TEXTS, tmp_path, engines)()
    assert [(job.method, job.budget) for job in engines.jobs[15:]] == [
        *[("tova", 20)] * 3,
        *[("rkv", 40)] * 3,
        *[("tova", 40)] * 3,
    ]


def test_an_interrupted_run_goes_on(tmp_path):
    engines = Engines(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    engines.left = 10**9
    report = Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert len(engines.jobs) == 6
    assert report == Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path / "other", Engines())()


def test_changed_arguments_are_noticed(tmp_path):
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()
    other = Setup("no-such-model", longest=61, buffer=16)
    with pytest.raises(KVPolicyError, match=r"--out .* holds results of other settings.*\n  buffer: was 8, is 16"):
        Fidelity(other, ["rkv"], [20], TEXTS, tmp_path, Engines())
    # Parameters of a method are part of its results.
    engines = Engines()
    Fidelity(Setup("no-such-model", 61, 8, configs={"rkv": {"mix": 0.5}}), ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs] == ["rkv"] * 3


def test_a_method_that_compacts_nothing_fails_the_run(tmp_path):
    with pytest.raises(RunError, match=r"rkv at 20 made no compaction of a#0.*60 tokens exceed budget \+ buffer = 28"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines(compactions=0))()
    # Its results are not stored.
    engines = Engines()
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs] == ["rkv"] * 3


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(KVPolicyError, match=r"settings.json is damaged.*remove"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())


def test_a_budget_beyond_the_text_needs_no_compaction(tmp_path):
    report = Fidelity(SETUP, ["rkv"], [60], TEXTS, tmp_path, Engines(compactions=0, harm=9.0))()
    (row,) = report["rows"]
    assert row["excess"] == 0
    assert row["excess_interval"] == [0, 0]
    assert row["positions"] == 3 * 59
    assert row["by_distance"] == []


@pytest.mark.parametrize("damage", [lambda _: b"half", lambda whole: whole[:-30], lambda _: b""])
def test_a_damaged_result_is_named(tmp_path, damage):
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()
    result = next((tmp_path / "results" / "rkv-20").iterdir())
    result.write_bytes(damage(result.read_bytes()))
    with pytest.raises(KVPolicyError, match=r"rkv-20.*cannot be read.*remove it"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()


def test_results_appear_in_one_piece(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(TypeError):
        store.save("a/b", {"x": 1, "file": 2})  # numpy accepts no array of that name
    assert "a/b" not in store


def test_methods_share_an_engine_where_they_can():
    setup = Setup("m", 10, configs={"random": {"sinks": 4}, "rkv": {"mix": 0.5}})
    assert setup.groups(["skipkv", "rkv", "random", "h2o", "thinkv"]) == [
        ["rkv", "skipkv", "h2o", "thinkv"],
        ["random"],
    ]
    assert Setup("m", 10).groups(["skipkv", "rkv"]) == [["skipkv", "rkv"]]
    arguments = setup.engine_arguments(["rkv", "skipkv"])
    assert arguments["kv_policy_config"] == {"mix": 0.5}
    assert arguments["kv_request_policies"] == ["skipkv"]
    assert arguments["kv_protect_prompt"] is False
    assert arguments["enable_prefix_caching"] is False


def test_random_protects_the_beginning_of_a_text():
    assert with_fair_random(["rkv", "random"], {}) == {"random": {"sinks": 64}}
    assert with_fair_random(["random"], {"random": {"seed": 3}}) == {"random": {"sinks": 64, "seed": 3}}
    assert with_fair_random(["random"], {"random": {"sinks": 0}}) == {"random": {"sinks": 0}}
    assert with_fair_random(["rkv"], {}) == {}
