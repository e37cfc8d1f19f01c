"""The kv heads of the layers that are compacted, where the other layers have more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm.config  # noqa: F401  # the next module cannot be imported first
from transformers import Gemma4TextConfig, PretrainedConfig, Qwen2Config
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig
from skipkv_vllm.integration import build, compat
from tests.unit.integration.compat.vllm_configs import make_vllm_config


def model_config(config: PretrainedConfig) -> SimpleNamespace:
    """As much of vLLM's configuration of a model as tells its heads."""
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    return SimpleNamespace(hf_text_config=config, model_arch_config=convertor(config, config).convert(), use_mla=False)


def gemma_4(num_global: int) -> SimpleNamespace:
    return model_config(
        Gemma4TextConfig(
            num_hidden_layers=6, num_key_value_heads=8, num_global_key_value_heads=num_global, attention_k_eq_v=True
        )
    )


def test_they_are_those_of_the_layers_with_full_attention():
    assert compat.total_kv_heads(gemma_4(2)) == 2
    assert compat.total_kv_heads(SimpleNamespace(use_mla=True)) == 1
    assert compat.total_kv_heads(model_config(Qwen2Config(num_hidden_layers=2, num_key_value_heads=4))) == 4


@pytest.mark.parametrize(("num_global", "first_heads"), [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1])])
def test_a_rank_counts_its_first_head_among_them(monkeypatch, num_global, first_heads):
    config = make_vllm_config(parallel_config__tensor_parallel_size=4)
    config.model_config = gemma_4(num_global)
    config.additional_config = {CONFIG_KEY: KVPolicyConfig(kv_policy="random").model_dump()}
    layers = {"model.layers.5.self_attn.attn": SimpleNamespace(num_kv_heads=1)}
    monkeypatch.setattr(compat, "evicting_layers", lambda _: layers)
    found = []
    for rank in range(4):
        monkeypatch.setattr(build, "get_tp_group", lambda rank=rank: SimpleNamespace(rank_in_group=rank))
        found.append(build.join_ranks(config, torch.device("cpu")).first_head)
    assert found == first_heads
