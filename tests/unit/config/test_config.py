"""Configuration: every bad value is refused with a message that says what was wrong and what to do."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm.envs
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from skipkv_vllm import bundled_gates
from skipkv_vllm.config import KVPolicyConfig, RequestOptions, flag_names, parse_json_object
from skipkv_vllm.config import request as request_module
from skipkv_vllm.config.flags import flags_table
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.needs import IN_THE_CACHE, Need
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import refusals
from skipkv_vllm.integration.compat import version as version_check
from skipkv_vllm.integration.compat.flags import SCHEDULER, WORKERS
from skipkv_vllm.plugin import register
from skipkv_vllm.policies import base, make_policy, policy_names
from skipkv_vllm.policies.rkv import RKV
from skipkv_vllm.policies.skipkv import SkipKV
from skipkv_vllm.policies.streaming_llm import StreamingLLM
from tests.entry_points import sources

# ---- policies


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


# ---- the server's configuration


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
        ({"kv_policy": "rkv", "kv_budget": 1}, ["kv_budget=1", "greater than or equal to 2"]),
        ({"kv_policy": "rkv", "kv_budget": -5}, ["kv_budget=-5", "greater than or equal to 2"]),
        ({"kv_policy": "rkv", "kv_budget": "many"}, ["kv_budget='many'", "integer"]),
        ({"kv_policy": "rkv", "kv_budget": 100.5}, ["kv_budget=100.5", "integer"]),
        ({"kv_policy": "rkv", "kv_budget": None}, ["kv_budget=None", "integer"]),
        ({"kv_policy": "rkv", "kv_buffer": 0}, ["kv_buffer=0", "greater than or equal to 1"]),
        ({"kv_policy": "rkv", "kv_window": 0}, ["kv_window=0", "greater than or equal to 1"]),
        ({"kv_policy": "rkv", "kv_window": 65}, ["kv_window=65", "less than or equal to 64"]),
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
    with pytest.raises(ValueError, match="kv_budget=1: input should be") as error:
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


# ---- a request's options

SERVER = KVPolicyConfig(kv_policy="rkv", kv_budget=100)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"kv_budgett": 64}, ["'kv_budgett'", "did you mean 'kv_budget'"]),
        ({"kv-budget": 64}, ["'kv-budget'", "did you mean 'kv_budget'"]),
        ({"kv_polcy": "rkv"}, ["'kv_polcy'", "did you mean 'kv_policy'"]),
        ({"kv_budget": True}, ["kv_budget=True", "integer"]),
        ({"kv_budget": "64"}, ["kv_budget='64'", "integer"]),
        ({"kv_budget": 64.0}, ["kv_budget=64.0", "integer"]),
        ({"kv_budget": [64]}, ["kv_budget=[64]", "integer"]),
        ({"kv_budget": 8}, ["kv_budget=8", "9 to 500", "max_model_len", "window of 8"]),
        ({"kv_budget": 0}, ["kv_budget=0", "9 to 500"]),
        ({"kv_budget": 501}, ["kv_budget=501", "9 to 500", "max_model_len"]),
        ({"kv_budget": 12, "kv_policy": "streaming_llm"}, ["kv_budget=12", "13 to 500", "4 sinks"]),
        ({"kv_policy": "nope"}, ["kv_policy='nope'", "full, caote"]),
        ({"kv_policy": 3}, ["kv_policy=3", "string"]),
        ({"kv_policy": "finch"}, ["'finch' compacts the prompt", "protected", "--no-kv-protect-prompt"]),
        ({"kv_policy": "laq"}, ["'laq' compacts the prompt", "protected", "--no-kv-protect-prompt"]),
        ({"kv_task_tokens": 4}, ["kv_task_tokens=4", "'rkv' does not score by a question"]),
        ({"kv_task_tokens": 0, "kv_policy": "finch"}, ["kv_task_tokens=0", "greater than or equal to 1"]),
        ({"kv_task_tokens": 65, "kv_policy": "finch"}, ["kv_task_tokens=65", "less than or equal to 64"]),
        (
            {"kv_policy": "skipkv"},
            [
                "kv_policy='skipkv'",
                "sentences and recurrence and output_error",
                "--kv-request-policies skipkv",
                "'rkv' or 'full'",
            ],
        ),
    ],
)
def test_a_bad_request_option_is_refused(extra, parts):
    with pytest.raises(KVPolicyError) as error:
        RequestOptions.parse(extra, SERVER, 500)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"kv_task_tokens": 9}, ["kv_task_tokens=9", "1 to 8", "--kv-window"]),
        ({"kv_budget": 16}, ["kv_budget=16", "17 to 500", "window of 8", "question of 8"]),
        ({"kv_budget": 12, "kv_task_tokens": 4}, ["kv_budget=12", "13 to 500", "question of 4"]),
    ],
)
def test_a_question_must_fit_the_window_and_the_budget(extra, parts):
    server = KVPolicyConfig(kv_policy="finch", kv_protect_prompt=False, kv_budget=100)
    assert RequestOptions.parse({"kv_task_tokens": 3}, server, 500).resolve_policy(server).num_question(8) == 3
    assert RequestOptions.parse({}, server, 500).resolve_policy(server).num_question(8) == 8
    with pytest.raises(KVPolicyError) as error:
        RequestOptions.parse(extra, server, 500)
    for part in parts:
        assert part in str(error.value)


def test_a_server_that_does_not_decode_ahead_says_what_would():
    server = KVPolicyConfig(kv_policy="finch", kv_protect_prompt=False)
    with pytest.raises(KVPolicyError, match=r"'laq' needs lookahead, which this server .* --kv-request-policies laq"):
        RequestOptions.parse({"kv_policy": "laq"}, server, 5000)


@pytest.mark.parametrize("key", ["kv_window", "kv_buffer", "kv_granularity", "kv_protect_prompt", "kv_policy_config"])
def test_an_option_that_only_the_server_has_is_refused_in_a_request(key):
    # Without an error, the client would believe that the option works.
    with pytest.raises(KVPolicyError, match=key):
        RequestOptions.parse({key: 1}, SERVER, 500)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *[
            (key, "did you mean 'kv_budget'")
            for key in ("KV_BUDGET", "kvBudget", "Budget", "skipkv_budget", "KV.Budgett")
        ],
        *[(key, "did you mean 'kv_policy'") for key in ("policy", "POLICY", "skip-kv/policy", "skipkv_kv_policy")],
        *[(key, "did you mean 'steering'") for key in ("Steering", "kv_steering", "skipkv.steering")],
        *[
            (key, "did you mean 'steering_alpha0'")
            for key in ("kv-steering-alpha-0", "steering-alpha-0", "steering_alfa0")
        ],
        ("task_tokens", "did you mean 'kv_task_tokens'"),
        *[
            (key, "whole server, not for a request; start it with --kv-window")
            for key in ("window", "KV-Window", "kv_windw")
        ],
        *[(key, "start it with --kv-protect-prompt") for key in ("protect_prompt", "kvProtectPrompt")],
        ("kv_steering_default", "start it with --kv-steering-default"),
        *[(key, "write each option under its own name") for key in ("skipkv", "SkipKV", "skip_kv", "skipkv_options")],
    ],
)
def test_a_name_that_is_nearly_ours_is_refused(key, meant):
    for value in (64, {"budget": 64}):
        with pytest.raises(KVPolicyError) as error:
            RequestOptions.parse({key: value}, SERVER, 500)
        assert repr(key) in str(error.value)
        assert meant in str(error.value)


def test_names_of_any_number_and_length_cost_little(monkeypatch):
    looked_at = []
    monkeypatch.setattr(request_module, "meant_option", looked_at.append)
    RequestOptions.check_names(["x" * 10_000_000, *(f"name{i}" for i in range(100_000))])
    assert len(looked_at) < 2000


def test_few_names_are_compared_letter_by_letter(monkeypatch):
    compared = []
    monkeypatch.setattr(
        request_module.difflib, "get_close_matches", lambda word, near, **_: compared.extend(near) or []
    )
    for name in ("priority", "session_id", "trace_headers", "cache_salt", "top_a", "remote_block_ids"):
        request_module.meant_option.__wrapped__(name)
    assert len(compared) <= 40, "of 6 names with 27 options each"


def test_names_that_vllm_and_its_connectors_read_are_never_refused():
    read = re.compile(r"""(?:extra\w*|xargs|params)(?:\s+or\s+\{\}\))?(?:\.get\(|\[)\s*["'](\w+)["']""")
    texts = [text for _, text in sources("", "extra_args", "vllm_xargs", "transfer_params")]
    names = {name for text in texts for name in read.findall(text)}
    assert names >= {"kv_transfer_params", "ec_transfer_params", "session_id", "do_remote_prefill", "remote_block_ids"}
    assert names >= {"kv_cache_report_mode", "ngram_size", "window_size", "diffusion_canvas_length"}
    assert RequestOptions.parse(dict.fromkeys(names, 1), SERVER, 500) == RequestOptions()


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {"a": 1}, "my_own": 3, "temperature_note": "x"}])
def test_keys_that_are_not_ours_are_left_alone(extra):
    options = RequestOptions.parse(extra, SERVER, 500)
    assert (options.kv_policy, options.kv_budget) == (None, None)
    assert options.resolve_policy(SERVER) == SERVER.policy


def test_a_request_may_choose_what_the_server_can_do():
    assert RequestOptions.parse({"kv_policy": "full"}, SERVER, 500).resolve_policy(SERVER).name == "full"
    assert RequestOptions.parse({"kv_policy": "streaming_llm"}, SERVER, 500).resolve_policy(SERVER) == StreamingLLM()
    server = KVPolicyConfig(kv_policy="skipkv", kv_policy_config={"decay": 0.3})
    assert RequestOptions.parse({"kv_policy": "rkv"}, server, 500).resolve_policy(server) == RKV()
    assert RequestOptions.parse({"kv_policy": "skipkv"}, server, 500).resolve_policy(server) == SkipKV(decay=0.3)
    assert RequestOptions.parse({"kv_budget": 9}, SERVER, 500).kv_budget == 9
    assert RequestOptions.parse({"kv_budget": 500}, SERVER, 500).kv_budget == 500


def test_the_guide_names_what_a_server_does_not_serve_by_default():
    server, refused = KVPolicyConfig(kv_policy="skipkv"), []
    for name in policy_names():
        with suppress(KVPolicyError):
            RequestOptions.parse({"kv_policy": name}, server, 5000)
            continue
        refused.append(name)
    assert refused == ["finch", "h2o", "laq", "thinkv", "trimkv", "vatp"]
    text = (Path(__file__).parents[3] / "docs" / "guides" / "per-request.md").read_text()
    rows = re.search(r"offers every method except:(.*?)\n## ", text, re.S).group(1)
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows.splitlines() if row.startswith("|"))))
    assert named == set(refused)


def test_the_servers_own_method_may_be_named_among_the_further_ones():
    config = make_vllm_config()
    config.model_config.get_total_num_hidden_layers = lambda: 2
    own = {"kv_policy": "thinkv", "kv_policy_config": {"layers": "all"}}
    server = KVPolicyConfig.parse(own | {"kv_request_policies": ["rkv", "thinkv"]})
    assert server.policies == [server.policy, make_policy("rkv")]
    compat.check_config(config, server)
    # The server's own method keeps its configuration, which names gates; the defaults name none.
    own = {"kv_policy": "trimkv", "kv_policy_config": {"gates": bundled_gates()}}
    server = KVPolicyConfig.parse(own | {"kv_request_policies": ["trimkv"]})
    assert RequestOptions.parse({"kv_policy": "trimkv"}, server, 500).resolve_policy(server) == server.policy


def test_sentences_are_compared_in_one_way(monkeypatch):
    """`skipkv` compares sentences by words, so a method that reads hidden states cannot be served beside it."""

    class ByHidden(RKV):
        name = "by_hidden"
        needs = Need.HIDDEN | Need.SENTENCES

    monkeypatch.setitem(base._REGISTRY, "by_hidden", ByHidden)
    with pytest.raises(KVPolicyError, match=r"by hidden states and by words.*drop one of the methods"):
        KVPolicyConfig.parse({"kv_policy": "skipkv", "kv_request_policies": ["by_hidden"]})
    KVPolicyConfig.parse({"kv_policy": "rkv", "kv_request_policies": ["by_hidden"]})


def test_a_server_can_collect_for_further_methods():
    server = KVPolicyConfig(kv_policy="rkv", kv_request_policies=["h2o", "skipkv"])
    assert Need.ATTENTION_MASS in server.needs
    assert Need.RECURRENCE | Need.OUTPUT_ERROR in server.needs
    for name in ("h2o", "skipkv"):
        assert RequestOptions.parse({"kv_policy": name}, server, 500).resolve_policy(server) == make_policy(name)
        with pytest.raises(KVPolicyError, match=f"--kv-request-policies {name}"):
            RequestOptions.parse({"kv_policy": name}, KVPolicyConfig(kv_policy="rkv"), 500)


def test_the_budget_of_the_server_must_hold_the_sinks_of_a_method_chosen():
    server = KVPolicyConfig(kv_policy="rkv", kv_budget=9)
    with pytest.raises(KVPolicyError, match=r"kv_budget=9 is out of range; allowed: at least 13 .* 4 sinks"):
        RequestOptions.parse({"kv_policy": "streaming_llm"}, server, 500)
    assert RequestOptions.parse({"kv_policy": "streaming_llm", "kv_budget": 13}, server, 500).kv_budget == 13
    assert RequestOptions.parse({"kv_policy": "full"}, server, 500).kv_policy == "full"


@pytest.mark.parametrize(
    ("policy", "names", "parts"),
    [
        ("skipkv", ["h2o", "nope"], ["kv_request_policies", "'nope'", "h2o, keydiff"]),
        ("skipkv", ["h2o,random"], ["kv_request_policies", "'h2o,random'", "by spaces"]),
        ("skipkv", ["h2o", "epicache"], ["kv_request_policies", "'epicache'", "EpiCache", "2509.17396", "by layer"]),
        ("adakv", [], ["kv_policy", "'adakv'", "AdaKV", "2407.11550", "by head", "block table", "Use snapkv"]),
        ("full", ["h2o"], ["kv_request_policies", "'full'", "--kv-policy"]),
        ("skipkv", ["finch"], ["'finch' compacts the prompt", "--no-kv-protect-prompt"]),
    ],
)
def test_bad_request_policies_are_refused(policy, names, parts):
    with pytest.raises(KVPolicyError) as error:
        KVPolicyConfig.parse({"kv_policy": policy, "kv_request_policies": names})
    for part in parts:
        assert part in str(error.value)


def test_a_request_is_told_why_a_method_is_not_offered():
    server = KVPolicyConfig(kv_policy="rkv")
    with pytest.raises(KVPolicyError, match=r"kv_policy='epicache' \(EpiCache, arXiv 2509.17396\) is not offered: "):
        RequestOptions.parse({"kv_policy": "epicache"}, server, 500)


# ---- flags on vLLM's own parser


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    register()
    register()  # twice, because vLLM may do so
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    return parser


@pytest.fixture
def engine_args(parser, tmp_path) -> Callable[..., EngineArgs]:
    # An existing folder, so that vLLM does not query a model hub.
    return lambda *flags: EngineArgs.from_cli_args(parser.parse_args(["--model", str(tmp_path), *flags]))


def test_flags_reach_the_engine(engine_args):
    args = engine_args(
        *("--kv-policy", "skipkv", "--kv-budget", "256", "--kv-granularity", "sentence", "--no-kv-protect-prompt"),
        *("--kv-policy-config", '{"compat": "paper", "similarity_threshold": 0.97}'),
    )
    sent = KVPolicyConfig.parse(args.additional_config["skipkv"])
    assert sent == KVPolicyConfig(
        kv_policy="skipkv",
        kv_budget=256,
        kv_granularity="sentence",
        kv_protect_prompt=False,
        kv_policy_config={"compat": "paper", "similarity_threshold": 0.97},
    )
    assert args.scheduler_cls == SCHEDULER
    assert args.worker_cls in WORKERS.values()


def test_parsed_arguments_reach_a_process_without_the_plugin(parser, tmp_path):
    """Each of several API servers makes its configuration from the arguments that the command parsed."""
    parsed = parser.parse_args(["--model", str(tmp_path), "--kv-policy", "rkv"])
    here = EngineArgs.from_cli_args(parsed)
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    elsewhere = EngineArgs(**{name: value for name, value in vars(parsed).items() if name in fields})
    assert elsewhere == here == EngineArgs.from_cli_args(parsed)
    assert "skipkv" in elsewhere.additional_config


def test_other_additional_config_is_kept(engine_args):
    args = engine_args("--kv-policy", "rkv", "--additional-config", '{"mine": 1}')
    assert set(args.additional_config) == {"mine", "skipkv"}


@pytest.mark.parametrize("flags", [(), ("--kv-policy", "full")])
def test_nothing_changes_without_a_policy(engine_args, parser, tmp_path, flags):
    plain = parser.parse_args(["--model", str(tmp_path)])
    names = [field.name for field in dataclasses.fields(EngineArgs) if hasattr(plain, field.name)]
    expected = EngineArgs(**{name: getattr(plain, name) for name in names})
    assert engine_args(*flags) == expected
    assert expected.scheduler_cls is None
    assert expected.worker_cls == "auto"
    assert "skipkv" not in (expected.additional_config or {})


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kv-policy", "nope"], ["kv_policy='nope'", "skipkv"]),
        (["--kv-budget", "100"], ["--kv-budget", "without --kv-policy", "add --kv-policy skipkv"]),
        (["--no-kv-protect-prompt"], ["--kv-protect-prompt", "without --kv-policy"]),
        (["--kv-policy", "rkv", "--kv-budget", "4"], ["kv_budget=4", "at least 9"]),
        (["--kv-policy", "rkv", "--kv-budget", "many"], ["--kv-budget", "many"]),
        (["--kv-policy", "rkv", "--kv-buffer", "0"], ["kv_buffer=0"]),
        (["--kv-policy", "rkv", "--kv-granularity", "layer"], ["--kv-granularity", "layer", "sentence"]),
        (
            ["--kv-policy", "rkv", "--kv-policy-config", "{mix: 1}"],
            ["--kv-policy-config", "{mix: 1}", "not valid JSON"],
        ),
        (["--kv-policy", "rkv", "--kv-policy-config", "[1]"], ["--kv-policy-config", "[1]", "not an object"]),
        (["--kv-policy", "rkv", "--kv-policy-config", '{"mixx": 1}'], ["'mixx'", "mix, pool"]),
        (["--kv-policy", "rkv", "--kv-policy-config", '{"mix": "a"}'], ["mix='a'", "float"]),
        (["--kv-policy", "full", "--kv-policy-config", '{"mix": 1}'], ["'mix'", "'full'"]),
        (["--kv-policy", "rkv", "--scheduler-cls", "my.Scheduler"], ["scheduler_cls='my.Scheduler'", "drop one"]),
        (["--kv-policy", "rkv", "--worker-cls", "my.Worker"], ["worker_cls='my.Worker'", "drop one"]),
    ],
)
def test_bad_flags_end_the_command_with_a_message(engine_args, capsys, flags, parts):
    with pytest.raises(SystemExit) as end:
        engine_args(*flags)
    assert end.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_a_users_own_classes_are_fine_without_a_policy(engine_args):
    assert engine_args("--worker-cls", "my.Worker").worker_cls == "my.Worker"


def test_every_flag_is_on_the_parser_with_its_default_in_the_help(parser):
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for name, flag in flag_names().items():
        default = KVPolicyConfig.model_fields[name].get_default(call_default_factory=True)
        assert f"Default: {default}." in actions[flag].help
    assert actions["--no-kv-protect-prompt"] is actions["--kv-protect-prompt"]


def test_offline_arguments():
    given = {"kv_policy": "rkv", "kv_budget": 128, "kv_policy_config": {"mix": 0.2}}
    engine = {"dtype": "float32", "additional_config": {"mine": 1}}
    changed = compat.engine_arguments(given, engine)
    assert changed["dtype"] == "float32"
    assert changed["additional_config"]["mine"] == 1
    assert changed["additional_config"]["skipkv"]["kv_budget"] == 128
    assert engine == {"dtype": "float32", "additional_config": {"mine": 1}}, "the input is not modified"
    assert given["kv_policy_config"] == {"mix": 0.2}
    assert compat.engine_arguments({}, engine) == engine
    assert compat.engine_arguments({"kv_policy": "full"}, engine) == engine
    with pytest.raises(KVPolicyError, match="kv-budget given without --kv-policy"):
        compat.engine_arguments({"kv_budget": 128}, engine)


# ---- what is refused


def make_vllm_config(**changes) -> SimpleNamespace:
    """Return a plain decoder-only model with all optional features off."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            is_mm_prefix_lm=False,
            get_sliding_window=lambda: None,
            skip_tokenizer_init=False,
            is_multimodal_model=False,
            enable_prompt_embeds=False,
            uses_mrope=False,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            data_parallel_size=1,
            distributed_executor_backend="mp",
            enable_dbo=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        diffusion_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        use_v2_model_runner=False,
        additional_config=None,
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, name)
        setattr(target, name, value)
    return config


def test_a_layer_that_the_model_does_not_have_is_refused():
    config = make_vllm_config()
    config.model_config.get_total_num_hidden_layers = lambda: 4
    compat.check_config(config, KVPolicyConfig(kv_policy="rkv", kv_request_policies=["thinkv"]))
    policy = KVPolicyConfig(kv_policy="thinkv", kv_policy_config={"layers": "9,1"})
    with pytest.raises(KVPolicyError, match="kv_policy='thinkv': layers='1,9', but this model has layers 0 to 3; name"):
        compat.check_config(config, policy)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_config__runner_type": "pooling"}, ["'pooling' runner", "--runner"]),
        ({"model_config__is_encoder_decoder": True}, ["encoder-decoder", "decoder-only model"]),
        ({"model_config__use_mla": True}, ["MLA", "decoder-only model"]),
        ({"model_config__is_hybrid": True}, ["hybrid", "decoder-only model"]),
        ({"model_config__is_attention_free": True}, ["state-space", "decoder-only model"]),
        ({"diffusion_config": object()}, ["diffusion models", "decoder-only model"]),
        ({"model_config__is_mm_prefix_lm": True}, ["prefix-LM", "decoder-only model"]),
        ({"model_config__get_sliding_window": lambda: 4096}, ["sliding-window", "decoder-only model"]),
        ({"speculative_config": object()}, ["speculative decoding", "Drop --speculative-config"]),
        ({"kv_transfer_config": object()}, ["KV connectors", "Drop --kv-transfer-config and --kv-off"]),
        ({"parallel_config__decode_context_parallel_size": 2}, ["context parallelism", "Set its size to 1"]),
        ({"parallel_config__prefill_context_parallel_size": 2}, ["context parallelism", "Set its size to 1"]),
        ({"parallel_config__enable_dbo": True}, ["dual-batch overlap", "Drop --enable-dbo"]),
        ({"cache_config__cache_dtype": "nvfp4"}, ["--kv-cache-dtype nvfp4", "Use --kv-cache-dtype auto or fp8"]),
        ({"cache_config__cache_dtype": "fp8_per_token_head"}, ["--kv-cache-dtype fp8_per_token_head", "one scale"]),
        ({"model_config__skip_tokenizer_init": True}, ["--skip-tokenizer-init", "'skipkv'", "Drop"]),
    ],
)
def test_an_unsupported_feature_is_refused(changes, parts):
    policy = KVPolicyConfig(kv_policy="skipkv")
    with pytest.raises(KVPolicyError) as error:
        compat.check_config(make_vllm_config(**changes), policy)
    for part in ("--kv-policy does not support", *parts, "or start without --kv-policy"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"use_v2_model_runner": True}, ["Model Runner V2", "Set VLLM_USE_V2_MODEL_RUNNER=0"]),
        ({"parallel_config__pipeline_parallel_size": 2}, ["pipeline parallelism", "--tensor-parallel-size"]),
        ({"parallel_config__data_parallel_size": 2}, ["data parallelism", "several servers"]),
        ({"lora_config": object()}, ["LoRA", "Drop --enable-lora"]),
        ({"model_config__is_multimodal_model": True}, ["multimodal models", "text model"]),
        ({"model_config__enable_prompt_embeds": True}, ["prompt embeddings", "text model"]),
        ({"model_config__uses_mrope": True}, ["several dimensions", "text model"]),
    ],
)
@pytest.mark.parametrize("is_own", [True, False])
def test_what_tokens_decoded_ahead_cannot_go_through_is_refused(is_own, changes, parts):
    chosen = {"kv_policy": "laq"} if is_own else {"kv_policy": "rkv", "kv_request_policies": ["finch", "laq"]}
    policy = KVPolicyConfig(kv_protect_prompt=False, **chosen)
    compat.check_config(make_vllm_config(parallel_config__tensor_parallel_size=2), policy)
    compat.check_config(make_vllm_config(**changes), KVPolicyConfig(kv_policy="finch", kv_protect_prompt=False))
    with pytest.raises(KVPolicyError) as error:
        compat.check_config(make_vllm_config(**changes), policy)
    flag = "--kv-policy laq" if is_own else "--kv-request-policies laq"
    for part in (f"{flag} does not support", *parts, f"or start without {flag}"):
        assert part in str(error.value)


def test_a_server_that_steers_does_not_decode_ahead():
    policy = KVPolicyConfig(kv_policy="laq", kv_protect_prompt=False, kv_steering_vectors={"a": "/nowhere"})
    with pytest.raises(KVPolicyError, match=r"--kv-policy laq does not support steering.*Drop --kv-steering-vectors"):
        compat.check_config(make_vllm_config(), policy)


@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_a_model_may_be_spread_over_ranks(granularity, backend):
    config = make_vllm_config(
        parallel_config__tensor_parallel_size=2,
        parallel_config__pipeline_parallel_size=2,
        parallel_config__distributed_executor_backend=backend,
    )
    compat.check_config(config, KVPolicyConfig(kv_policy="skipkv", kv_granularity=granularity))


def test_a_pipeline_on_rays_compiled_graphs_is_refused(monkeypatch):
    # Not by the environment variable: vLLM reads it once per process, when an engine starts.
    monkeypatch.setitem(vars(vllm.envs), "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False)
    policy = KVPolicyConfig(kv_policy="rkv")
    on_ray = {"parallel_config__distributed_executor_backend": "ray"}
    compat.check_config(make_vllm_config(**on_ray), policy)
    with pytest.raises(KVPolicyError, match=r"compiled graphs.*Unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        compat.check_config(make_vllm_config(parallel_config__pipeline_parallel_size=2, **on_ray), policy)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("vllm.platforms.current_platform.is_fp8_fnuz", "on this GPU: it stores another float8"),
        ("vllm._custom_ops.cpu_has_amx_fp8", "on this CPU: how vLLM packs pages for AMX-FP8"),
    ],
)
def test_8_bits_are_refused_where_their_meaning_or_their_place_is_not_known(function, reason, monkeypatch):
    config, policy = make_vllm_config(cache_config__cache_dtype="fp8"), KVPolicyConfig(kv_policy="rkv")
    compat.check_config(config, policy)
    monkeypatch.setattr(function, lambda: True)
    with pytest.raises(KVPolicyError, match=f"--kv-cache-dtype fp8 {reason}.*Use --kv-cache-dtype auto, or"):
        compat.check_config(config, policy)
    compat.check_config(make_vllm_config(), policy)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_a_plain_model_is_accepted(dtype):
    compat.check_config(make_vllm_config(cache_config__cache_dtype=dtype), KVPolicyConfig(kv_policy="skipkv"))


def test_a_tokenizer_is_needed_only_for_sentences():
    config = make_vllm_config(model_config__skip_tokenizer_init=True)
    compat.check_config(config, KVPolicyConfig(kv_policy="rkv"))
    with pytest.raises(KVPolicyError, match="granularity 'sentence'"):
        compat.check_config(config, KVPolicyConfig(kv_policy="rkv", kv_granularity="sentence"))


def cache_of(*specs) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_cache_layouts_other_than_one_full_attention_group_are_refused():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    full = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    sliding = SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64)
    evicts, steers = KVPolicyConfig(kv_policy="skipkv"), KVPolicyConfig()
    compat.check_kv_cache(cache_of(full), evicts)
    for specs, names in (
        ((full, full), "FullAttentionSpec, FullAttentionSpec"),
        ((full, sliding), "FullAttentionSpec, SlidingWindowSpec"),
        ((sliding,), "SlidingWindowSpec"),
        ((), "none"),
    ):
        for policy, flag in ((evicts, "--kv-policy"), (steers, "--kv-steering-vectors")):
            with pytest.raises(KVPolicyError) as error:
                compat.check_kv_cache(cache_of(*specs), policy)
            assert f"{flag} does not support this model's KV cache ({names})" in str(error.value)
            assert "one group of full-attention layers" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sliding_window": 64}, "attention with sliding_window=64: its mask"),
        # Like Llama 4 in vLLM, whose hybrid manager is off.
        ({"attention_chunk_size": 8192}, "attention with attention_chunk_size=8192: its mask"),
        ({"non_causal": True}, "attention with non_causal=True: its mask"),
        ({"head_size_v": 4}, "keys of 8 and values of 4"),
        ({"num_head_slots": 1}, "1 cells for 2 heads"),
        ({"state_content_bytes": 20}, "same size for every token"),
    ],
)
def test_full_attention_that_is_not_plain_is_refused(changes, part):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, **changes)
    with pytest.raises(KVPolicyError, match=part):
        compat.check_kv_cache(cache_of(spec), KVPolicyConfig(kv_policy="skipkv"))


def test_attention_that_would_misread_compacted_pages_is_refused():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flex_attention import FlexAttentionImpl

    def layer(kind, alibi_slopes=None, kv_sharing_target_layer_name=None):
        # Without the constructors, which need an engine's configuration.
        impl = kind.__new__(kind)
        impl.alibi_slopes, impl.kv_sharing_target_layer_name = alibi_slopes, kv_sharing_target_layer_name
        return impl

    plain = layer(CPUAttentionBackendImpl)
    compat.check_attention([plain])
    for other, message in (
        (layer(CPUAttentionBackendImpl, alibi_slopes=[0.5]), r"ALiBi: its bias counts.*Serve a decoder-only model"),
        (layer(CPUAttentionBackendImpl, None, "layers.0"), "layers that share a cache: each of them"),
        (layer(FlexAttentionImpl), r"FlexAttentionImpl: .*Use --attention-backend FLASH_ATTN, FLASHINFER"),
    ):
        with pytest.raises(KVPolicyError, match=f"--kv-policy does not support .*{message}"):
            compat.check_attention([plain, other])


def test_every_attention_that_is_accepted_is_watched():
    watched = {symbol.rpartition(":")[2] for symbol in version_check.tested()["symbols"]}
    assert {f"{name}.forward" for name in refusals.BACKENDS} <= watched


@pytest.mark.parametrize(
    ("additional", "expected"), [(None, False), ({}, False), ({"mine": 1}, False), ({"skipkv": {}}, True)]
)
def test_has_policy(additional, expected):
    assert compat.has_policy(SimpleNamespace(additional_config=additional)) is expected
