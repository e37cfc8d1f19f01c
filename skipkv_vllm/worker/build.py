"""Build the runtime of a worker from vLLM's configuration and loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from .. import compat
from ..ops.paging import Layout, PagedCache, cpu_layout
from ..policies import Need
from ..sentences import build_tables
from ..sentences.tracker import SentenceTracker
from ..trace import TraceWriter
from .queries import QueryRing
from .runtime import EvictionRuntime

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.skipkv")


def attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's attention layers by name, in model order."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}


def build_runtime(vllm_config: VllmConfig, device: torch.device) -> EvictionRuntime:
    """Allocate what the policy needs. Call it after the model is loaded and before memory is profiled,
    so that vLLM leaves room for it."""
    config = compat.policy_config(vllm_config)
    model, scheduling = vllm_config.model_config, vllm_config.scheduler_config
    options = config.policy.sentence_options
    layers = attention_layers(vllm_config)
    num_slots = scheduling.max_num_seqs
    ring = tracker = trace = None
    if config.needs & Need.QUERIES:
        first = next(iter(layers.values()))
        ring = QueryRing(
            num_layers=len(layers),
            num_slots=num_slots,
            window=config.kv_window,
            num_heads=first.num_heads,
            head_size=first.head_size,
            max_tokens=scheduling.max_num_batched_tokens,
            dtype=model.dtype,
            device=device,
        )
        for i, layer in enumerate(layers.values()):
            ring.attach(i, layer.impl)
    if config.needs & Need.SENTENCES:
        tracker = SentenceTracker(
            build_tables(cached_tokenizer_from_config(model), options.compat),
            options,
            num_slots=num_slots,
            max_length=model.max_model_len,
            hidden_size=model.get_hidden_size() if config.needs & Need.HIDDEN else 0,
            vocab_size=model.get_vocab_size(),
            dtype=model.dtype,
            device=device,
        )
    if config.kv_trace_dir is not None:
        trace = TraceWriter(config.kv_trace_dir, vllm_config.parallel_config.rank)
    held = (ring.nbytes if ring else 0) + (tracker.nbytes if tracker else 0)
    logger.info("SkipKV: %.1f MiB for observation queries and sentences of %d requests", held / 2**20, num_slots)
    return EvictionRuntime(config, num_slots, ring, tracker, trace, device)


def bind_cache(runtime: EvictionRuntime, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Show the runtime the KV pages once vLLM has allocated them."""
    layers = attention_layers(vllm_config)
    (group,) = kv_cache_config.kv_cache_groups
    names = [name for name in layers if name in set(group.layer_names)]
    cache = PagedCache.of([layers[name].kv_cache for name in names], _layout(layers[names[0]]))
    runtime.bind_cache(cache, group.kv_cache_spec.block_size)


def _layout(layer: Any) -> Layout:
    # By the class that reads the pages: a backend registered in another's place keeps that one's name.
    if any(cls.__name__ == "CPUAttentionBackendImpl" for cls in type(layer.impl).__mro__):
        return cpu_layout(layer.isa)  # set by vLLM when it builds the attention metadata
    return Layout.ROWS


def without_sidecar(available: int, vllm_config: VllmConfig) -> int:
    """Memory left for KV pages when each token also needs its entry in the position sidecar, and in the attention
    mass where a policy adds it up.

    Args:
        available: bytes that vLLM would use for KV pages.
        vllm_config: with the model loaded.
    """
    shape = compat.model_shape(vllm_config, len(attention_layers(vllm_config)))
    extra = shape.sidecar_bytes(compat.policy_config(vllm_config).needs)
    return available * shape.kv_bytes // (shape.kv_bytes + extra)
