"""Which drafters are served beside a policy, what they take, and how their layers are told from the model's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import speculation
from tests.unit.integration.compat.vllm_configs import make_vllm_config

POLICY = KVPolicyConfig(kv_policy="skipkv")


def config_of(method: str = "eagle", number: int = 3, **changes) -> SimpleNamespace:
    """A configuration with drafts; `changes` are of its speculation."""
    fields = {
        "method": method,
        "parallel_drafting": False,
        "enable_adaptive_verification": False,
        "uses_dynamic_speculative_decoding": lambda: False,
    }
    config = make_vllm_config(speculative_config=SimpleNamespace(**fields | changes))
    config.num_speculative_tokens = number
    config.num_lookahead_tokens = 0 if method == "ngram" else number
    return config


@pytest.mark.parametrize("method", speculation.DRAFTERS)
def test_tested_drafters_are_served(method):
    speculation.check_speculation(config_of(method), POLICY)
    speculation.check_speculation(make_vllm_config(), POLICY)


@pytest.mark.parametrize(
    ("config", "policy", "parts"),
    [
        (config_of("medusa"), POLICY, ["the drafter 'medusa'", "only ngram, ngram_gpu", "Drop --speculative-config"]),
        (config_of(parallel_drafting=True), POLICY, ["parallel drafting"]),
        (config_of(enable_adaptive_verification=True), POLICY, ["a number of drafts that changes"]),
        (config_of(uses_dynamic_speculative_decoding=lambda: True), POLICY, ["a number of drafts that changes"]),
        (
            config_of(),
            KVPolicyConfig(kv_policy="skipkv", kv_protect_prompt=False, kv_request_policies=["laq"]),
            ["'laq' beside speculative decoding", "ahead"],
        ),
        (config_of(number=32), POLICY, ["32 speculative tokens", "at most 31", "--kv-buffer"]),
        (config_of(number=4), KVPolicyConfig(kv_policy="snapkv", kv_buffer=4), ["4 speculative tokens", "at most 3"]),
    ],
)
def test_others_are_refused_by_name(config, policy, parts):
    with pytest.raises(KVPolicyError) as error:
        speculation.check_speculation(config, policy)
    for part in parts:
        assert part in str(error.value)


def test_pipelines_and_hybrids_are_refused():
    config = config_of()
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(KVPolicyError, match=r"in a pipeline.*--pipeline-parallel-size"):
        speculation.check_speculation(config, POLICY)
    config = config_of()
    config.model_config.is_hybrid = True
    with pytest.raises(KVPolicyError, match="a sliding window or a state in some layers"):
        speculation.check_speculation(config, POLICY)


def test_a_drafter_of_several_modules_is_refused():
    compat.check_drafter(SimpleNamespace(num_prefill_lookahead=1))
    with pytest.raises(KVPolicyError, match="several modules of multi-token prediction"):
        compat.check_drafter(SimpleNamespace(num_prefill_lookahead=2))


@pytest.mark.parametrize(("method", "expected"), [("ngram", 3), ("eagle", 6)])
def test_slots_of_drafts(method, expected):
    assert compat.num_draft_slots(config_of(method)) == expected
    assert compat.num_draft_slots(make_vllm_config()) == 0


def test_layers_of_a_drafter_are_those_that_the_model_does_not_contain():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    drafter, config = nn.Linear(1, 1), config_of()
    layers = {"0": model[0], "1": model[1], "2": drafter}
    config.compilation_config = SimpleNamespace(static_forward_context=layers)
    compat.mark_draft_layers(config, model)
    assert [name for name, layer in layers.items() if speculation.is_draft_layer(layer)] == ["2"]
    assert not speculation.is_draft_layer(object())
