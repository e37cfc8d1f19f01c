"""The server's configuration: bad values, defaults and what is derived from them."""

from __future__ import annotations

import json
import re

import pytest

from skipkv_vllm.config import KVPolicyConfig, flag_names, parse_json_object
from skipkv_vllm.config.flags import flags_table
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.needs import IN_THE_CACHE, Need


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kv_policy": "nope"}, ["kv_policy='nope'", "choose one of", "skipkv"]),
        ({"kv_policy": "rkv", "kv_budget": 8}, ["kv_budget=8", "at least 9", "window of 8"]),
        ({"kv_policy": "rkv", "kv_window": 64, "kv_budget": 64}, ["kv_budget=64", "at least 65", "window of 64"]),
        (
            {"kv_policy": "streaming_llm", "kv_budget": 12},
            ["kv_budget=12", "at least 13", "window of 8", "4 sinks"],
        ),
        ({"kv_policy": "finch"}, ["'finch' compacts the prompt", "protected", "--no-kv-protect-prompt"]),
        (
            {"kv_policy": "finch", "kv_protect_prompt": False, "kv_policy_config": {"task_tokens": 9}},
            ["task_tokens=9", "1 to 8", "--kv-window"],
        ),
        ({"kv_policy": "rkv", "kv_budget": 1}, ["kv_budget=1", "at least 2"]),
        ({"kv_policy": "rkv", "kv_budget": -5}, ["kv_budget=-5", "at least 2"]),
        ({"kv_policy": "rkv", "kv_budget": "many"}, ["kv_budget='many'", "whole number"]),
        ({"kv_policy": "rkv", "kv_budget": 100.5}, ["kv_budget=100.5", "whole number"]),
        ({"kv_policy": "rkv", "kv_budget": None}, ["kv_budget=None", "whole number"]),
        ({"kv_policy": "rkv", "kv_buffer": 0}, ["kv_buffer=0", "at least 1"]),
        ({"kv_policy": "rkv", "kv_window": 0}, ["kv_window=0", "at least 1"]),
        ({"kv_policy": "rkv", "kv_window": 65}, ["kv_window=65", "at most 64"]),
        ({"kv_policy": "rkv", "kv_granularity": "layer"}, ["kv_granularity='layer'", "'head' or 'sentence'"]),
        ({"kv_policy": "rkv", "kv_protect_prompt": "maybe"}, ["kv_protect_prompt='maybe'", "boolean"]),
        ({"kv_policy": "rkv", "kv_policy_config": [1]}, ["kv_policy_config=[1]", "dictionary"]),
        ({"kv_policy": "rkv", "kv_policy_config": {"mixx": 1}}, ["'mixx'", "mix, pool"]),
        ({"kv_policy": "full", "kv_policy_config": {"mix": 1}}, ["'mix'", "'full'"]),
        ({"kv_policy": "rkv", "budget": 100}, ["budget is not an option"]),
    ],
)
def test_a_bad_server_option_is_refused(values, parts):
    with pytest.raises(KVPolicyError) as error:
        KVPolicyConfig.parse(values)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("field", ["kv_budget", "kv_buffer", "kv_window"])
def test_a_boolean_is_not_a_number(field):
    # `LLM(kv_buffer=True)` would otherwise mean a buffer of one token.
    with pytest.raises(KVPolicyError, match=f"{field}=True"):
        KVPolicyConfig.parse({"kv_policy": "rkv", field: True})


def test_several_bad_fields_are_all_named():
    with pytest.raises(KVPolicyError) as error:
        KVPolicyConfig.parse({"kv_policy": "rkv", "kv_buffer": 0, "kv_window": 0})
    assert "kv_buffer=0" in str(error.value)
    assert "kv_window=0" in str(error.value)


def test_the_error_is_a_value_error_without_pydantic_noise():
    with pytest.raises(ValueError, match="kv_budget=1 is out of range; allowed: at least 2") as error:
        KVPolicyConfig.parse({"kv_budget": 1})
    assert "pydantic" not in str(error.value)
    assert "validation error" not in str(error.value)


def test_the_smallest_allowed_budget():
    assert KVPolicyConfig.parse({"kv_policy": "rkv", "kv_budget": 9}).kv_budget == 9
    assert KVPolicyConfig.parse({"kv_policy": "streaming_llm", "kv_budget": 13}).kv_budget == 13


def test_the_configuration_survives_the_way_to_the_workers():
    config = KVPolicyConfig(kv_policy="skipkv", kv_budget=99, kv_policy_config={"decay": 0.2}, kv_trace_dir="/tmp/x")
    assert KVPolicyConfig.parse(json.loads(json.dumps(config.model_dump()))) == config


def test_needs():
    assert KVPolicyConfig(kv_policy="streaming_llm").needs == Need.NOTHING
    assert KVPolicyConfig(kv_policy="streaming_llm", kv_granularity="sentence").needs == Need.SENTENCES
    assert KVPolicyConfig(kv_policy="rkv").needs == Need.QUERIES | Need.KEYS
    paper = KVPolicyConfig(kv_policy="skipkv", kv_policy_config={"compat": "paper"})
    assert paper.needs == Need.QUERIES | Need.KEYS | Need.SENTENCES | Need.HIDDEN
    default = KVPolicyConfig(kv_policy="skipkv").needs
    assert default & ~IN_THE_CACHE == Need.QUERIES | Need.SENTENCES | Need.RECURRENCE | Need.OUTPUT_ERROR


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ({"kv_policy": "rkv"}, 8),
        ({"kv_policy": "thinkv"}, 8),
        ({"kv_policy": "streaming_llm", "kv_window": 3}, 3),
        ({"kv_policy": "skipkv", "kv_policy_config": {"compat": "paper"}}, 8),
        ({"kv_policy": "skipkv"}, 32),
        ({"kv_policy": "h2o"}, 32),
        ({"kv_policy": "vatp"}, 32),
        ({"kv_policy": "skipkv", "kv_window": 40}, 40),
        # A method that a request may choose counts like the server's own.
        ({"kv_policy": "rkv", "kv_request_policies": ["h2o"]}, 32),
        ({"kv_policy": "rkv", "kv_request_policies": ["snapkv"]}, 8),
    ],
)
def test_workers_keep_more_queries_only_for_sums_over_them(options, queries):
    assert KVPolicyConfig(**options).num_queries == queries


def test_the_trace_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert KVPolicyConfig(kv_policy="rkv", kv_trace_dir="t").kv_trace_dir == str(tmp_path / "t")


def test_every_field_has_a_flag_and_a_row_in_the_table():
    table = flags_table()
    for name, flag in flag_names().items():
        assert flag == "--" + name.replace("_", "-")
        assert flag.removeprefix("--") in table
        assert KVPolicyConfig.model_fields[name].description in table
    assert "| `--[no-]kv-protect-prompt` | `on` |" in table
    assert "| `--kv-budget` | `1024` |" in table


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{mix: 0.1}", ["--flag", "{mix: 0.1}", "not valid JSON", "quote it"]),
        ("", ["--flag", "not valid JSON"]),
        ("[1]", ["--flag", "[1]", "not an object", '{"recent_share": 0.4}']),
        ("3", ["not an object"]),
        ("null", ["not an object"]),
        ('"text"', ["not an object"]),
    ],
)
def test_bad_json_is_refused(text, parts):
    with pytest.raises(KVPolicyError) as error:
        parse_json_object("--flag", text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_recall_share": 0.4}, "--kv-recall-share given without --kv-recall-memory"),
        ({"kv_recall_interval": 8, "kv_recall_threshold": 2.0}, "--kv-recall-interval, --kv-recall-threshold given"),
        ({"kv_recall_memory": 1.0, "kv_policy": "full"}, "kv_policy is 'full', which evicts nothing"),
        ({"kv_recall_memory": 1.0, "kv_policy": "thinkv"}, "which are not stored with evicted tokens"),
        ({"kv_recall_memory": 1.0, "kv_policy": "rkv", "kv_request_policies": ["thinkv"]}, "kv_policy='thinkv' reads"),
        ({"kv_recall_memory": 1.0, "kv_policy": "finch", "kv_protect_prompt": False}, "always keeps the question"),
        ({"kv_recall_memory": -1.0}, "kv_recall_memory"),
        ({"kv_recall_memory": float("inf")}, "kv_recall_memory"),
        ({"kv_recall_memory": 1.0, "kv_recall_share": 1.0}, "kv_recall_share"),
        ({"kv_recall_memory": 1.0, "kv_recall_interval": 0}, "kv_recall_interval"),
        ({"kv_recall_memory": 1.0, "kv_recall_threshold": 0.0}, "kv_recall_threshold"),
    ],
)
def test_recall_that_cannot_work_is_refused(options, message):
    with pytest.raises(KVPolicyError, match=re.escape(message)):
        KVPolicyConfig.parse({"kv_policy": "skipkv"} | options)


def test_recall_needs_queries_and_sentences():
    without, with_recall = (KVPolicyConfig.parse({"kv_policy": "knorm", "kv_recall_memory": gib}) for gib in (0.0, 0.5))
    assert not without.needs & (Need.QUERIES | Need.SENTENCES)
    assert with_recall.needs & Need.QUERIES
    assert with_recall.needs & Need.SENTENCES
    assert (without.num_queries, with_recall.num_queries) == (8, 16)
