"""Options of a request: accepted ones, and messages about the others."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

from skipkv_vllm import bundled_gates
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.config import request as request_module
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.needs import Need
from skipkv_vllm.integration import compat
from skipkv_vllm.policies import base, make_policy, policy_names
from skipkv_vllm.policies.rkv import RKV
from skipkv_vllm.policies.skipkv import SkipKV
from skipkv_vllm.policies.streaming_llm import StreamingLLM
from tests.entry_points import sources
from tests.unit.integration.compat.vllm_configs import make_vllm_config

SERVER = KVPolicyConfig(kv_policy="rkv", kv_budget=100)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"kv_budgett": 64}, ["'kv_budgett'", "did you mean 'kv_budget'"]),
        ({"kv-budget": 64}, ["'kv-budget'", "did you mean 'kv_budget'"]),
        ({"kv_polcy": "rkv"}, ["'kv_polcy'", "did you mean 'kv_policy'"]),
        ({"kv_budget": True}, ["kv_budget=True", "whole number"]),
        ({"kv_budget": "64"}, ["kv_budget='64'", "whole number"]),
        ({"kv_budget": 64.0}, ["kv_budget=64.0", "whole number"]),
        ({"kv_budget": [64]}, ["kv_budget=[64]", "whole number"]),
        ({"kv_budget": 8}, ["kv_budget=8", "9 to 500", "max_model_len", "window of 8"]),
        ({"kv_budget": 0}, ["kv_budget=0", "9 to 500"]),
        ({"kv_budget": 501}, ["kv_budget=501", "9 to 500", "max_model_len"]),
        ({"kv_budget": 12, "kv_policy": "streaming_llm"}, ["kv_budget=12", "13 to 500", "4 sinks"]),
        ({"kv_policy": "nope"}, ["kv_policy='nope'", "full, caote"]),
        ({"kv_policy": 3}, ["kv_policy=3", "a text"]),
        ({"kv_policy": "finch"}, ["'finch' compacts the prompt", "protected", "--no-kv-protect-prompt"]),
        ({"kv_policy": "laq"}, ["'laq' compacts the prompt", "protected", "--no-kv-protect-prompt"]),
        ({"kv_policy": "full", "kv_budget": 64}, ["kv_budget=64 has no effect", "kv_policy='full'", "leave it out"]),
        ({"kv_task_tokens": 4}, ["kv_task_tokens=4", "'rkv' does not score by a question"]),
        ({"kv_task_tokens": 0, "kv_policy": "finch"}, ["kv_task_tokens=0", "at least 1"]),
        ({"kv_task_tokens": 65, "kv_policy": "finch"}, ["kv_task_tokens=65", "at most 64"]),
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
        *[(key, "whole server; start the server with --kv-window") for key in ("window", "KV-Window", "kv_windw")],
        *[(key, "start the server with --kv-protect-prompt") for key in ("protect_prompt", "kvProtectPrompt")],
        ("kv_steering_default", "start the server with --kv-steering-default"),
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
