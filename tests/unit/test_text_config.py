"""The groups of the KV cache that follow from a configuration are those that vLLM makes."""

from __future__ import annotations

from importlib import import_module
from unittest import mock

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.platforms.interface import Platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from skipkv_vllm.capacity import StateSizes, block_size_of
from skipkv_vllm.capacity.text_config import groups_of, kinds_of, others_of, shape_of, unsupported
from skipkv_vllm.core.limits import NO_OTHERS
from skipkv_vllm.integration.compat.version import located
from skipkv_vllm.integration.compat.watched import POOL_GROUPS


def kinds(pattern: str) -> list[str]:
    names = {"s": "sliding_attention", "f": "full_attention", "l": "linear_attention"}
    return [names[each] for each in pattern]


WITH_WINDOWS = ["ffff", "sssssf" * 3, "sf" * 12, "ssfsf", "sfff", "ssffs", "s" * 7 + "ff"]


@pytest.mark.parametrize("pattern", [*WITH_WINDOWS, "lllf" * 12, "llflf", "lf" * 2, "llffl", "lfff"])
def test_groups_are_as_vllm_makes_them(pattern):
    settings = {"num_hidden_layers": len(pattern), "layer_types": kinds(pattern)}
    config = Qwen3NextConfig(**settings) if "l" in pattern else Gemma3TextConfig(**settings, sliding_window=64)
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    page = FullAttentionSpec(**shape).page_size_bytes
    by_kind = {
        "f": FullAttentionSpec(**shape),
        "s": SlidingWindowSpec(**shape, sliding_window=64),
        "l": MambaSpec(block_size=16, shapes=((8, 8),), dtypes=(torch.float32,), page_size_padded=page),
    }
    specs = {f"layers.{i}": by_kind[kind] for i, kind in enumerate(pattern)}
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
    # Two ranks have 2 and 1 kv heads of 64 and 256 features; four have one of each.
    assert groups_of(larger, 16, 2)[-2:] == (16, 32)
    assert groups_of(larger, 16, 4)[-2:] == (16, 64)
    assert [group.most_blocks for group in others_of(larger, 16, 4096, 2, 4).groups] == [4] * 5
    shape = shape_of(larger, ranks=1, element_size=2)
    assert (shape.num_kv_heads, shape.head_size) == (2, 256)
    assert unsupported(larger) is None
    assert unsupported(Gemma4TextConfig(**sizes, num_kv_shared_layers=2)) == "layers that share a cache"
    assert unsupported(Gemma4TextConfig(**sizes, global_head_dim=512)) == (
        "heads of 512 features, of which kernels for GPUs take at most 256"
    )


@pytest.mark.parametrize(
    ("shape", "ranks", "sums", "block_size", "expected"),
    [
        # Qwen3-Next-80B-A3B with states in bfloat16 and float32, and on several ranks.
        ({}, 1, "auto", 16, 544),
        ({}, 1, "float32", 16, 1056),
        ({}, 1, "float32", 256, 1280),
        ({}, 2, "float32", 16, 1056),
        ({}, 4, "auto", 16, 272),
        ({"head_dim": 32, "linear_key_head_dim": 32, "linear_num_value_heads": 16}, 1, "float32", 32, 1120),
        ({"head_dim": 64, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, 1, "auto", 128, 128),
    ],
)
def test_a_block_is_as_large_as_a_state(shape, ranks, sums, block_size, expected):
    config = Qwen3NextConfig(**shape)
    heads, dtype = max(1, config.num_key_value_heads // ranks), torch.bfloat16
    model = mock.Mock(spec=["get_mamba_state_shape_from_config", "get_mamba_state_dtype_from_config"])
    model.get_mamba_state_shape_from_config.return_value = MambaStateShapeCalculator.gated_delta_net_state_shape(
        ranks, config.linear_num_key_heads, config.linear_num_value_heads,
        config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim,
    )  # fmt: skip
    found = MambaStateDtypeCalculator.gated_delta_net_state_dtype(dtype, "auto", sums)
    model.get_mamba_state_dtype_from_config.return_value = found
    vllm_config = mock.MagicMock()
    vllm_config.cache_config.cache_dtype = "auto"
    vllm_config.cache_config.block_size = block_size
    vllm_config.model_config.dtype, vllm_config.model_config.use_mla = dtype, False
    vllm_config.model_config.get_num_kv_heads.return_value = heads
    vllm_config.model_config.get_head_size.return_value = config.head_dim
    backend = mock.Mock()
    backend.customize_spec = lambda spec: spec
    backend.get_supported_kernel_block_sizes.return_value = [16, 32, 64]
    with (
        mock.patch("vllm.model_executor.models.ModelRegistry.resolve_model_cls", return_value=(model, "")),
        mock.patch("vllm.config.vllm.set_current_vllm_config"),
        mock.patch.object(Platform, "_find_non_ssm_backends", return_value=[backend]),
    ):
        Platform._align_hybrid_block_size(vllm_config, backend)
    own = StateSizes(ranks, last_tokens=2, sums=found[1].itemsize, kv=2)
    assert block_size_of(config, block_size, own) == vllm_config.cache_config.block_size == expected
    # The size that vLLM arrived at stays as it is.
    assert block_size_of(config, expected, own) == expected


def test_qwen3_next_has_states_beside_full_attention():
    config = Qwen3NextConfig()
    assert unsupported(config) is None
    assert groups_of(config, 544) == (12, 3, 12, 544, 544)
    shape = shape_of(config, ranks=1, element_size=2)
    assert (shape.num_layers, shape.num_pooled_layers, shape.kv_bytes) == (12, 12, 2 * 12 * 2 * 256 * 2)
    others = others_of(config, 544, 4096, 2)
    assert (others.num_blocks(10_000), others.peaks(10_000, 4096)) == (6, (3, 3, 3))
    assert others_of(config, 544, 4096, 2, has_prefix_cache=False).peaks(10_000, 4096) == (1, 1, 1)


def test_models_whose_states_were_not_tested_are_not_supported():
    config = Qwen3NextConfig()
    config.model_type = "olmo_hybrid"
    assert unsupported(config).startswith("linear_attention in a model other than qwen3_next")
