"""The worker's cache: positions of its tokens, scales of its keys, and the room that vLLM leaves for both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.needs import NUM_ACCUMULATED
from skipkv_vllm.integration import build
from skipkv_vllm.integration.build import left_for_kv
from skipkv_vllm.integration.compat import block_pool, cache_groups, model_shape, policy_config
from skipkv_vllm.ops import paging
from skipkv_vllm.ops.paging import FP8_CACHES, PagedCache, layer_pages
from skipkv_vllm.worker.cache import KVCache, query_bytes
from tests.operators.cases import Pages
from tests.unit.ops.test_paging import HEADS, PAGES


def sidecar(size: int = 4, layers: int = 2) -> KVCache:
    return KVCache(PagedCache.of([torch.zeros(PAGES, HEADS, size, 16)] * layers, paging.Layout.ROWS), size)


def whole(numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def read(side: KVCache, pages: list[int], length: int, placed: int, evicted: int) -> Tensor:
    return side.positions(whole([pages]), length, whole([placed]), whole([evicted]))[0]


def test_positions_before_any_compaction_are_the_slots():
    got = read(sidecar(), [4, 2], 6, 0, 0)
    assert got.dtype == torch.int32
    assert torch.equal(got, torch.arange(6, dtype=torch.int32).expand(2, HEADS, 6))


def test_positions_after_a_compaction():
    side = sidecar()
    # Head 0 of both layers keeps 0, 5, 2, 6 (5 into slot 1, 6 into slot 3); head 1 keeps its first four.
    side.sidecar[:, 3] = torch.tensor([[0, 5, 2, 6], [0, 1, 2, 3]])
    assert read(side, [3], 4, 4, 3)[0].tolist() == [[0, 5, 2, 6], [0, 1, 2, 3]]
    # Tokens appended since lie behind them, in order: slot 4 holds position 7.
    assert read(side, [3, 1], 6, 4, 3)[1].tolist() == [[0, 5, 2, 6, 7, 8], [0, 1, 2, 3, 7, 8]]


def test_positions_of_several_requests_are_read_at_once():
    side = sidecar()
    side.sidecar[:, 3] = torch.tensor([[0, 5, 2, 6], [0, 1, 2, 3]])
    got = side.positions(whole([[3, 1], [2, 0]]), 6, whole([4, 0]), whole([3, 0]))
    assert torch.equal(got[0], read(side, [3, 1], 6, 4, 3))
    assert torch.equal(got[1], read(side, [2, 4], 6, 0, 0))


@pytest.mark.parametrize("layout", list(paging.Layout))
@pytest.mark.parametrize("dtype", FP8_CACHES.values())
def test_keys_of_8_bits_are_read_as_float32(layout, dtype):
    pages = Pages(layout, dtype, size=32)
    cache = pages.empty(3)
    keys = torch.randn(2, 2, 40, 64)
    pages.write_keys(cache, torch.tensor([2, 1]), keys)
    for each, wanted in zip(cache.caches, keys, strict=True):
        got = layer_pages(each, layout).keys.read_pages(torch.tensor([2, 1]), 40)
        assert got.dtype is torch.float32
        assert torch.equal(got, wanted.to(dtype).float())


def attention_layer(kind: str, dtype: torch.dtype, *scale: float) -> Any:
    pages = torch.zeros(3, 2, 4, 16, dtype=dtype)
    return SimpleNamespace(kv_cache=pages, kv_cache_dtype=kind, num_kv_heads=2, _k_scale=torch.tensor(scale).squeeze())


def test_bytes_get_their_meaning_from_the_layer():
    for kind, meant in FP8_CACHES.items():
        layer = attention_layer(kind, torch.uint8, 1.0)
        assert build._pages(layer).dtype is meant
        assert build._pages(layer).data_ptr() == layer.kv_cache.data_ptr()
    layer = attention_layer("auto", torch.bfloat16, 1.0)
    assert build._pages(layer) is layer.kv_cache
    with pytest.raises(KVPolicyError, match=r"'fp8_per_token_head' KV cache.*use --kv-cache-dtype bfloat16"):
        build._pages(attention_layer("fp8_per_token_head", torch.uint8, 1.0))


def test_scales_of_keys():
    one, two = attention_layer("fp8", torch.uint8, 0.5), attention_layer("fp8", torch.uint8, 2.0, 3.0)
    assert torch.equal(build._key_scales([one, two]), torch.tensor([[0.5, 0.5], [2.0, 3.0]]))
    assert build._key_scales([attention_layer("fp8", torch.uint8, 1.0)]) is None
    # vLLM leaves whatever the checkpoint says where nothing is quantised.
    assert build._key_scales([attention_layer("auto", torch.bfloat16, 0.5)]) is None


@pytest.mark.parametrize(
    ("policy", "options", "queries"),
    [
        ("streaming_llm", {}, 0),
        ("rkv", {}, 8),
        ("rkv", {"kv_request_policies": ["h2o"]}, NUM_ACCUMULATED),
        # Recent queries, and those of the beginning of an answer.
        ("laq", {"kv_policy_config": {"lookahead": 20}, "kv_protect_prompt": False}, 8 + 20),
        # A question is at most as long as the window.
        ("finch", {"kv_policy_config": {"ask_chunks": True}, "kv_protect_prompt": False}, 8 + 8),
    ],
)
def test_profiling_counts_the_queries_of_a_request(policy, options, queries, monkeypatch):
    spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    layer = SimpleNamespace(
        impl=None, num_heads=128, num_kv_heads=1, head_size=576, get_kv_cache_spec=lambda config: spec
    )
    config = KVPolicyConfig(kv_policy=policy, kv_budget=2048, kv_window=8, **options)
    vllm_config: Any = SimpleNamespace(
        additional_config={CONFIG_KEY: config.model_dump()},
        model_config=SimpleNamespace(max_model_len=32768),
        compilation_config=SimpleNamespace(static_forward_context={str(i): layer for i in range(61)}),
    )
    seen = []
    monkeypatch.setattr(build, "temporary_bytes", lambda *sizes: seen.append(sizes) or 16)
    build.profile_compactions(vllm_config, torch.device("cpu"))
    assert seen == [(61, 1, 2048 + config.kv_buffer, queries * query_bytes(61, 128, 576, 2))]


@pytest.mark.parametrize(
    ("policy", "extra", "left"),
    [
        ("rkv", [], 64),
        ("rkv", ["h2o"], 63),
        ("h2o", [], 63),
        ("skipkv", [], 62),
        ("skipkv", ["h2o"], 61),
    ],
)
def test_pages_leave_room_for_state_positions_and_sums(policy, extra, left):
    # The pool can hold no request of 1,152 tokens, so there is state for one.
    # 2 layers x 2 heads x 2 * 62 elements of 2 bytes are 992 bytes a token; positions add 16, the mass as many, and
    # errors with the number of queries twice as many.
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=62, dtype=torch.bfloat16)
    layer = SimpleNamespace(impl=None, get_kv_cache_spec=lambda config: spec)
    model_config = SimpleNamespace(
        dtype=torch.bfloat16,
        max_model_len=100,
        get_num_attention_heads=lambda parallel: 2,
        get_hidden_size=lambda: 124,
        get_vocab_size=lambda: 500,
    )
    vllm_config: Any = SimpleNamespace(
        additional_config={CONFIG_KEY: KVPolicyConfig(kv_policy=policy, kv_request_policies=extra).model_dump()},
        model_config=model_config,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        kv_transfer_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
        max_in_flight_tokens=128,
        max_concurrent_batches=2,
        compilation_config=SimpleNamespace(
            static_forward_context={"a": layer, "b": layer}, max_cudagraph_capture_size=None
        ),
        cache_config=SimpleNamespace(block_size=16),
        scheduler_config=SimpleNamespace(
            max_num_seqs=4, max_num_batched_tokens=64, disable_hybrid_kv_cache_manager=False
        ),
    )
    groups = cache_groups(vllm_config)
    shape, pool = model_shape(vllm_config, groups), block_pool(vllm_config, groups, 1)
    state = shape.row_bytes(policy_config(vllm_config), 1, pool)
    assert left_for_kv(state + 63 * 1024, vllm_config) // 992 == left
