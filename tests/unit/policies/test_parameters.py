"""Parameters of methods: a bad value is refused with a message that names the error and the remedy."""

from __future__ import annotations

import dataclasses

import pytest

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.policies import make_policy, policy_names
from skipkv_vllm.policies.rkv import RKV
from skipkv_vllm.policies.skipkv import SkipKV
from skipkv_vllm.policies.streaming_llm import StreamingLLM


def test_defaults_are_the_papers():
    assert make_policy("skipkv", {"compat": "paper"}) == SkipKV(
        compat="paper", mix=0.1, pool=7, redundancy_threshold=0.5, similarity_threshold=0.95, max_sentences=256
    )
    assert make_policy("rkv") == RKV(mix=0.1, pool=7, redundancy_threshold=0.5)
    assert make_policy("streaming_llm") == StreamingLLM(sinks=4)
    config = KVPolicyConfig(kv_policy="skipkv")
    assert (config.kv_window, config.kv_buffer, config.kv_granularity) == (8, 128, "head")


def test_full_comes_first_in_the_list():
    first, *others = policy_names()
    assert first == "full"
    assert others == sorted(others)
    assert {"skipkv", "rkv", "streaming_llm"} < set(others)


def test_an_integer_is_fine_where_a_float_is_meant():
    assert make_policy("rkv", {"mix": 1}).mix == 1


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("nope", {}, ["kv_policy='nope'", "full, caote, finch", "skipkv, snapkv"]),
        ("rkv", {"mixx": 0.1}, ["'mixx'", "'rkv'", "mix, pool, redundancy_threshold"]),
        ("full", {"mix": 0.1}, ["'mix'", "'full'", "none"]),
        ("rkv", {"similarity_threshold": 0.9}, ["'similarity_threshold'", "'rkv'"]),
        ("rkv", {"mix": "0.1"}, ["mix='0.1'", "float", "0.1"]),
        ("rkv", {"mix": True}, ["mix=True", "float"]),
        ("rkv", {"mix": None}, ["mix=None", "float"]),
        ("rkv", {"mix": [0.1]}, ["mix=[0.1]", "float"]),
        ("rkv", {"pool": 7.0}, ["pool=7.0", "int"]),
        ("rkv", {"pool": True}, ["pool=True", "int"]),
        ("rkv", {"pool": 8}, ["pool=8", "odd", "9"]),
        ("rkv", {"pool": 0}, ["pool=0", "1 to 63"]),
        ("rkv", {"pool": 65}, ["pool=65", "1 to 63"]),
        ("rkv", {"mix": 1.5}, ["mix=1.5", "0.0 to 1.0"]),
        ("rkv", {"mix": float("nan")}, ["mix=nan", "0.0 to 1.0"]),
        ("rkv", {"redundancy_threshold": -2.0}, ["redundancy_threshold=-2.0", "-1.0 to 1.0"]),
        ("skipkv", {"similarity_threshold": 1.01}, ["similarity_threshold=1.01", "0.0 to 1.0"]),
        ("skipkv", {"max_sentences": 1}, ["max_sentences=1", "2 to 65536"]),
        ("skipkv", {"compat": "papers"}, ["compat='papers'", "default, paper, published"]),
        # The former name of the published code's rules.
        ("skipkv", {"compat": "reference"}, ["compat='reference'", "choose one of: default, paper, published"]),
        ("skipkv", {"compat": 1}, ["compat=1", "str"]),
        ("skipkv", {"recent_share": 1.1}, ["recent_share=1.1", "0.0 to 1.0"]),
        ("skipkv", {"recent_weight": 101}, ["recent_weight=101", "0.0 to 100.0"]),
        ("skipkv", {"decay": -0.1}, ["decay=-0.1", "0.0 to 1.0"]),
        ("skipkv", {"key_weight": -0.1}, ["key_weight=-0.1", "0.0 to 100.0"]),
        ("skipkv", {"sentence_weight": float("nan")}, ["sentence_weight=nan", "0.0 to 100.0"]),
        ("streaming_llm", {"sinks": -1}, ["sinks=-1", "0 to 4096"]),
        ("caote", {"base": "rkv"}, ["base='rkv'", "h2o, snapkv, tova"]),
        ("caote", {"form": "slow"}, ["form='slow'", "exact, fast"]),
        ("obcache", {"form": "both"}, ["form='both'", "value, key, joint"]),
        ("manifoldkv", {"centroid_window": -1}, ["centroid_window=-1", "0 to 1048576"]),
    ],
)
def test_a_bad_policy_parameter_is_refused(name, options, parts):
    with pytest.raises(KVPolicyError) as error:
        make_policy(name, options)
    for part in parts:
        assert part in str(error.value)


OF_THE_PAPER = {
    "mix": 0.2,
    "pool": 5,
    "redundancy_threshold": 0.6,
    "similarity_threshold": 0.9,
    "max_sentences": 9,
}
OF_THE_DEFAULT = {
    "recent_share": 0.4,
    "older_scale": 9.0,
    "recent_weight": 2.0,
    "decay": 0.8,
    "key_weight": 0.1,
    "sentence_weight": 0.0,
}


def test_every_parameter_belongs_to_one_rule_of_skipkv():
    assert {*OF_THE_PAPER, *OF_THE_DEFAULT, "compat"} == {field.name for field in dataclasses.fields(SkipKV)}
    assert make_policy("skipkv", OF_THE_DEFAULT) == SkipKV(**OF_THE_DEFAULT)
    for rule in ("paper", "published"):
        assert make_policy("skipkv", OF_THE_PAPER | {"compat": rule}) == SkipKV(**OF_THE_PAPER, compat=rule)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_parameter_of_the_papers_rule_is_refused_without_it(name):
    for rule in ({}, {"compat": "default"}):
        with pytest.raises(KVPolicyError) as error:
            make_policy("skipkv", {name: OF_THE_PAPER[name]} | rule)
        assert f"{name}={OF_THE_PAPER[name]} has no effect with compat='default'" in str(error.value)
        assert 'add "compat": "paper"' in str(error.value)
    # A server refuses it too, before it loads anything.
    with pytest.raises(KVPolicyError, match='add "compat": "paper"'):
        KVPolicyConfig.parse({"kv_policy": "skipkv", "kv_policy_config": {name: OF_THE_PAPER[name]}})


@pytest.mark.parametrize("rule", ["paper", "published"])
@pytest.mark.parametrize("name", OF_THE_DEFAULT)
def test_a_parameter_of_the_default_is_refused_with_another_rule(name, rule):
    with pytest.raises(KVPolicyError) as error:
        make_policy("skipkv", {name: OF_THE_DEFAULT[name], "compat": rule})
    assert f"{name}={OF_THE_DEFAULT[name]} has no effect with compat={rule!r}; leave it out" in str(error.value)
