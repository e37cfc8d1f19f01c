"""Settings of the accuracy harness: budgets, arms, engines and steering."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.accuracy import UsageError, worker
from benchmarks.accuracy.grid import Arm, Budget, Settings, Steer
from tests.unit.benchmarks.accuracy.fakes import SETTINGS


@pytest.mark.parametrize(("text", "tokens"), [("25%", 275), ("0.5%", 6), ("100%", 1101), ("512", 512), ("2", 2)])
def test_budgets(text, tokens):
    assert Budget(text).tokens(1100.6) == tokens


@pytest.mark.parametrize("text", ["0%", "101%", "x%", "%", "1", "0", "-5", "1.5", "abc", ""])
def test_bad_budgets(text):
    with pytest.raises(UsageError, match=r"--budgets .* neither a number of tokens"):
        Budget(text)


def test_arms_are_policies_times_budgets():
    settings = replace(SETTINGS, policies=("full", "skipkv", "rkv"))
    assert settings.tokens(1000) == {"25%": 250, "300": 300}
    assert settings.arms(4, [250, 300]) == [Arm(p, b, 4) for b in (250, 300) for p in ("skipkv", "rkv")]
    with pytest.raises(UsageError, match="same number of tokens"):
        settings.tokens(1200)


def test_settings_survive_json():
    settings = replace(SETTINGS, policy_config={"mix": 0.2}, engine={"dtype": "float32"})
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": ("full", "full")}, "--policies"),
        ({"batch_sizes": ()}, "--batch-sizes"),
        ({"batch_sizes": (0,), "problems_at": {}}, "--batch-sizes 0 is out of range; allowed: at least 1"),
        ({"samples": 0}, "--samples 0"),
        ({"samples": 4}, "--samples 4 with --temperature 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"problems": 0}, "--problems 0"),
        ({"problems_at": {8: 3}}, "--problems-at 8=3: 8 is not one of --batch-sizes: 4, 1"),
        ({"policies": ("skipkv",)}, "add full to --policies"),
        ({"budgets": ()}, "--budgets is empty"),
        ({"steering": ("v:1",)}, "'v' is not registered; there is none, give --steering-vectors NAME=FILE"),
        ({"steering": ("w:1",), "vectors": {"v": "f"}}, "'w' is not registered; there is v"),
        ({"steering": ("v",), "vectors": {"v": "f"}}, "'v' is not [POLICY/]VECTOR:ALPHA0[:GAMMA]"),
        ({"steering": ("v:1:2:3",), "vectors": {"v": "f"}}, "is not [POLICY/]VECTOR:ALPHA0[:GAMMA]"),
        ({"steering": ("v:x",), "vectors": {"v": "f"}}, "is not [POLICY/]VECTOR:ALPHA0[:GAMMA]"),
        ({"steering": ("rkv/v:1",), "vectors": {"v": "f"}}, "'rkv' is not one of --policies"),
        ({"own": {"rkv": {}}}, "--own: 'rkv' is not one of the evicting --policies"),
        ({"own": {"skipkv": {"buffer": 3}}}, "may have policy_config, protect_prompt, and nothing else"),
        ({"own": {"skipkv": 3}}, "may have policy_config, protect_prompt, and nothing else"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(UsageError) as error:
        replace(SETTINGS, **changes)
    assert said in str(error.value)


def test_one_engine_serves_all_policies():
    settings = replace(SETTINGS, policies=("full", "rkv", "skipkv", "random"), engine={"dtype": "float32"})
    arguments = worker.engine_arguments(settings, 4)
    assert arguments["kv_policy"] == "rkv"
    assert arguments["kv_request_policies"] == ["skipkv", "random"]
    assert arguments["max_num_seqs"] == 4
    assert arguments["dtype"] == "float32"
    assert "kv_policy" not in worker.engine_arguments(replace(SETTINGS, policies=("full",), budgets=()), 4)


OWN = replace(
    SETTINGS,
    policies=("full", "rkv", "trimkv", "finch"),
    own={"trimkv": {"policy_config": {"gates": "g"}}, "finch": {"protect_prompt": False}},
)


def test_a_policy_may_have_an_engine_of_its_own():
    shared = worker.engine_arguments(OWN.shared, 4)
    assert (shared["kv_policy"], shared["kv_request_policies"], shared["kv_protect_prompt"]) == ("rkv", [], True)
    trimkv, finch = (worker.engine_arguments(OWN.of(name), 4) for name in ("trimkv", "finch"))
    assert (trimkv["kv_policy"], trimkv["kv_policy_config"], trimkv["kv_protect_prompt"]) == (
        "trimkv",
        {"gates": "g"},
        True,
    )
    assert (finch["kv_policy"], finch["kv_policy_config"], finch["kv_protect_prompt"]) == ("finch", {}, False)
    # An unprotected prompt does not raise the bound.
    assert [OWN.limits(name, 50, 100).bound for name in ("rkv", "finch")] == [236, 178]
    assert Settings.from_json(json.loads(json.dumps(OWN.to_json()))) == OWN
    alone = replace(OWN, policies=("full", "trimkv"), own={"trimkv": {}})
    assert alone.shared.policies == ("full",)


STEERED = replace(SETTINGS, vectors={"v": "v.safetensors"}, steering=("v:1:0.02", "full/v:0.5"))


def test_ways_to_steer():
    assert Steer.parse("v:1") == Steer("v", 1.0, 0.0, None)
    assert Steer.parse("skipkv/v:0.5:0.02") == Steer("v", 0.5, 0.02, "skipkv")
    assert str(Steer.parse("skipkv/v:0.5:0.02")) == "v:0.5:0.02"
    assert Settings.from_json(json.loads(json.dumps(STEERED.to_json()))) == STEERED


def test_steered_arms_come_on_top():
    assert STEERED.arms(4, [250]) == [
        Arm("skipkv", 250, 4),
        Arm("full", 0, 4, "v:1:0.02"),
        Arm("skipkv", 250, 4, "v:1:0.02"),
        Arm("full", 0, 4, "v:0.5:0"),
    ]


def test_what_a_steered_request_asks_for():
    assert worker.engine_arguments(STEERED, 4)["kv_steering_vectors"] == {"v": "v.safetensors"}
    assert "kv_steering_vectors" not in worker.engine_arguments(SETTINGS, 4)
    plain, _, both, _ = STEERED.arms(4, [250])
    assert worker.request_options(plain, STEERED) == {"kv_policy": "skipkv", "kv_budget": 250}
    assert worker.request_options(both, STEERED) == {
        "kv_policy": "skipkv",
        "kv_budget": 250,
        "steering": "v",
        "steering_alpha0": 1.0,
        "steering_gamma": 0.02,
    }
