"""The groups of the KV cache that follow from a configuration are those that vLLM makes."""

from __future__ import annotations

from importlib import import_module
from unittest import mock

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, Gemma4TextConfig, GptOssConfig, MistralConfig, Qwen2Config
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from skipkv_vllm.capacity.text_config import groups_of, kinds_of, others_of, shape_of, unsupported
from skipkv_vllm.core.limits import NO_OTHERS
from skipkv_vllm.integration.compat.version import located
from skipkv_vllm.integration.compat.watched import POOL_GROUPS


def kinds(pattern: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[each] for each in pattern]


@pytest.mark.parametrize("pattern", ["ffff", "sssssf" * 3, "sf" * 12, "ssfsf", "sfff", "ssffs", "s" * 7 + "ff"])
def test_groups_are_as_vllm_makes_them(pattern):
    config = Gemma3TextConfig(num_hidden_layers=len(pattern), layer_types=kinds(pattern), sliding_window=64)
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    specs = {
        f"layers.{i}": SlidingWindowSpec(**shape, sliding_window=64) if kind == "s" else FullAttentionSpec(**shape)
        for i, kind in enumerate(pattern)
    }
    module, _, name = located(POOL_GROUPS).partition(":")
    vllm_config = mock.MagicMock(speculative_config=None, kv_transfer_config=None)
    vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False
    vllm_config.attention_config.hisparse_config = None
    vllm_config.cache_config.enable_prefix_caching = True
    planned = getattr(import_module(module), name)(vllm_config, specs)
    found = groups_of(config, 16)
    full = [group for group in planned if type(group.kv_cache_spec) is FullAttentionSpec]
    if len(full) > 1:
        assert unsupported(config) is not None
        return
    assert unsupported(config) is None
    assert found.num_full == len(full[0].layer_names)
    assert found.num_others == len(planned) - 1
    assert found.size == max(len(group.layer_names) for group in planned)


def test_gemma_3_has_windows_beside_full_attention():
    config = Gemma3TextConfig(num_hidden_layers=18, num_key_value_heads=1, head_dim=256, sliding_window=512)
    assert kinds_of(config) == kinds("sssssf" * 3)
    shape = shape_of(config, ranks=1, element_size=2)
    assert (shape.num_layers, shape.num_pooled_layers, shape.kv_bytes) == (3, 3, 2 * 3 * 256 * 2)
    others = others_of(config, 16, 4096, 2)
    assert [group.most_blocks for group in others.groups] == [34] * 5


def test_a_window_in_every_layer_is_not_supported():
    assert unsupported(MistralConfig(sliding_window=4096)) == "sliding_attention"
    assert unsupported(MistralConfig(sliding_window=None)) is None


def test_attention_that_scores_would_not_follow_is_not_supported():
    assert unsupported(GptOssConfig()) is None
    assert unsupported(Gemma2Config()) == "a soft cap of logits"


def test_a_window_that_is_not_used_does_not_count():
    config = Qwen2Config(use_sliding_window=False, sliding_window=4096)
    assert unsupported(config) is None
    assert others_of(config, 16, 4096, 2) == NO_OTHERS


def test_layers_with_more_kv_have_smaller_blocks():
    """As in Gemma 4, where a block of every group must take the same bytes."""
    sizes = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 128}
    alike = Gemma4TextConfig(**sizes, num_global_key_value_heads=1, global_head_dim=256, attention_k_eq_v=True)
    assert groups_of(alike, 16)[-2:] == (16, 16)
    larger = Gemma4TextConfig(**sizes, num_global_key_value_heads=2, global_head_dim=256, attention_k_eq_v=True)
    assert groups_of(larger, 16)[-2:] == (16, 32)
    shape = shape_of(larger, ranks=1, element_size=2)
    assert (shape.num_kv_heads, shape.head_size) == (2, 256)
    assert unsupported(larger) is None
    assert unsupported(Gemma4TextConfig(**sizes, num_kv_shared_layers=2)) == "layers that share a cache"
    assert unsupported(Gemma4TextConfig(**sizes, global_head_dim=512)) == "heads of 512 (at most 256)"
