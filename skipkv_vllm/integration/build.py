"""Build the runtime of a worker from vLLM's configuration and loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.tokenizers import cached_tokenizer_from_config

from ..core.errors import KVPolicyError
from ..core.needs import REPEATS, Need
from ..ops.paging import FP8_CACHES, Layout, PagedCache, cpu_layout
from ..policies.gates import Gates
from ..sentences import build_tables
from ..steering import tokenizer_digest
from ..steering.tables import build_thought_tables
from ..trace.writer import TraceWriter
from ..worker.ranks import Ranks
from ..worker.runtime import EvictionRuntime
from ..worker.signals.gates import TokenGates, attention_blocks
from ..worker.signals.queries import QueryRing
from ..worker.signals.sentences import SentenceTracker
from ..worker.steering import Steering, decoder_layers
from . import compat

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.skipkv")


def attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's attention layers by name, in model order."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}


def build_runtime(vllm_config: VllmConfig, model: nn.Module, device: torch.device) -> EvictionRuntime:
    """Allocate what the policy needs, and hook up steering. Call it after the model is loaded and before memory is
    profiled, so that vLLM leaves room for it, and in a memory pool that survives sleep level 2."""
    config = compat.policy_config(vllm_config)
    model_config, scheduling = vllm_config.model_config, vllm_config.scheduler_config
    options = config.policy.sentence_options
    layers = attention_layers(vllm_config)
    if config.evicts:
        compat.check_attention(layer.impl for layer in layers.values())
    num_slots = scheduling.max_num_seqs
    ranks = place_of(vllm_config, device)
    ring = tracker = gates = trace = None
    if config.needs & Need.QUERIES:
        first = next(iter(layers.values()))
        ring = QueryRing(
            num_layers=len(layers),
            num_slots=num_slots,
            num_kept=config.num_queries,
            num_heads=first.num_heads,
            head_size=first.head_size,
            max_tokens=scheduling.max_num_batched_tokens,
            dtype=model_config.dtype,
            device=device,
        )
        for i, layer in enumerate(layers.values()):
            ring.attach(i, layer.impl)
    # Sentences are compared by last hidden states, which a pipeline has at its end.
    if config.needs & Need.SENTENCES and get_pp_group().is_last_rank:
        tracker = SentenceTracker(
            build_tables(cached_tokenizer_from_config(model_config), options.compat),
            options,
            num_slots=num_slots,
            max_length=model_config.max_model_len,
            hidden_size=model_config.get_hidden_size() if config.needs & Need.HIDDEN else 0,
            vocab_size=model_config.get_vocab_size(),
            dtype=model_config.dtype,
            device=device,
            keeps_text=bool(config.needs & Need.RECURRENCE),
        )
    if config.gates is not None:
        gates = _build_gates(config.gates, vllm_config, ranks, device)
        gates.attach(attention_blocks(model, layers))
    if config.kv_trace_dir is not None:
        trace = TraceWriter(config.kv_trace_dir, vllm_config.parallel_config.rank)
    steering = _build_steering(vllm_config, model, device) if config.steers else None
    held = sum(part.nbytes for part in (ring, tracker, gates, steering) if part)
    logger.info(
        "SkipKV: %.1f MiB for observation queries, sentences and gates of %d requests%s",
        held / 2**20,
        num_slots,
        "; sleep mode moves them to host memory" if model_config.enable_sleep_mode else "",
    )
    return EvictionRuntime(config, num_slots, ring, tracker, gates, trace, device, ranks, steering)


def place_of(vllm_config: VllmConfig, device: torch.device) -> Ranks:
    """This worker's place among those of its engine. Every worker must call it, at the same point."""
    config, parallel = compat.policy_config(vllm_config), vllm_config.parallel_config
    layers = attention_layers(vllm_config)
    name, first = next(iter(layers.items()))
    num_stages, width = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    num_ranks = num_stages * width
    # A kv head may lie on several ranks, where there are more ranks than heads.
    first_head = get_tp_group().rank_in_group * vllm_config.model_config.get_total_num_kv_heads() // width
    first_layer = extract_layer_index(name) if num_stages > 1 else 0
    talks = config.kv_granularity == "sentence" or config.needs & Need.SEGMENTS
    talks = talks or (num_stages > 1 and config.needs & REPEATS)
    if num_ranks == 1 or not talks:
        return Ranks(first_layer=first_layer, first_head=first_head, num_stages=num_stages)
    # A group of our own: vLLM's sends between stages may wait for what we exchange. Its world may hold several
    # engines (data parallelism of mixture-of-experts models), and all of them must name all groups.
    own = None
    for start in range(0, dist.get_world_size(), num_ranks):
        members = list(range(start, start + num_ranks))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            own, speaker = group, members[-width]
    # Also opens the connections, so that vLLM's memory profiling sees what they take.
    count = torch.tensor([len(layers) * first.num_kv_heads], dtype=torch.int64, device=device)
    dist.all_reduce(count, group=own)
    return Ranks(int(count), first_layer, first_head, num_stages, own, speaker)


def most_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of the largest forward pass, padding included."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, largest_graph)


def _build_gates(learned: Gates, vllm_config: VllmConfig, ranks: Ranks, device: torch.device) -> TokenGates:
    model_config, layers = vllm_config.model_config, list(attention_layers(vllm_config).values())
    return TokenGates(
        learned.layers[ranks.first_layer : ranks.first_layer + len(layers)],
        first_head=ranks.first_head,
        num_heads=layers[0].num_kv_heads,
        activation=getattr(model_config.hf_text_config, "hidden_act", "unknown"),
        max_tokens=most_tokens(vllm_config),
        dtype=model_config.dtype,
        device=device,
    )


def _build_steering(vllm_config: VllmConfig, model: nn.Module, device: torch.device) -> Steering:
    config = compat.policy_config(vllm_config)
    model_config, scheduling = vllm_config.model_config, vllm_config.scheduler_config
    tokenizer, vectors = cached_tokenizer_from_config(model_config), config.load_vectors()
    num_layers = model_config.get_total_num_hidden_layers()
    for vector in vectors:
        vector.check_fits(model_config.get_hidden_size(), num_layers, tokenizer_digest(tokenizer))
    steering = Steering(
        build_thought_tables(tokenizer, model_config.get_vocab_size(), config.kv_steering_compat),
        vectors,
        interval=config.kv_steering_interval,
        num_slots=scheduling.max_num_seqs,
        max_tokens=most_tokens(vllm_config),
        device=device,
    )
    steering.attach(decoder_layers(model, num_layers))
    return steering


def bind_cache(runtime: EvictionRuntime, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Show the runtime the KV pages once vLLM has allocated them."""
    if not runtime.config.evicts:
        return
    layers = attention_layers(vllm_config)
    (group,) = kv_cache_config.kv_cache_groups
    bound = [layer for name, layer in layers.items() if name in set(group.layer_names)]
    cache = PagedCache.of([_pages(layer) for layer in bound], _layout(bound[0]))
    runtime.bind_cache(cache, group.kv_cache_spec.block_size, _key_scales(bound))


def _pages(layer: Any) -> Tensor:
    """A layer's pages with the dtype that their content has."""
    pages: Tensor = layer.kv_cache
    if pages.element_size() > 1:
        return pages
    # The layer knows it even where the checkpoint decided, not a flag.
    if layer.kv_cache_dtype not in FP8_CACHES:
        raise KVPolicyError(
            f"--kv-policy does not support this model's {layer.kv_cache_dtype!r} KV cache (known: "
            f"{', '.join(FP8_CACHES)}); use --kv-cache-dtype bfloat16, or start without --kv-policy"
        )
    return pages.view(FP8_CACHES[layer.kv_cache_dtype])


def _key_scales(layers: list[Any]) -> Tensor | None:
    """float32 `[layers, H]` by which stored keys must be multiplied; None where all of them are 1."""
    if layers[0].kv_cache.element_size() > 1:
        return None
    # One number a layer, or one a head. Waits for the device, but only here.
    scales = torch.stack([layer._k_scale.float().flatten().expand(layer.num_kv_heads) for layer in layers])
    return None if bool((scales == 1).all()) else scales


def _layout(layer: Any) -> Layout:
    # By the class that reads the pages: a backend registered in another's place keeps that one's name.
    if any(cls.__name__ == "CPUAttentionBackendImpl" for cls in type(layer.impl).__mro__):
        return cpu_layout(layer.isa)  # set by vLLM when it builds the attention metadata
    return Layout.ROWS


def without_sidecar(available: int, vllm_config: VllmConfig) -> int:
    """Memory left for KV pages when each token also needs its entry in the position sidecar, and in those that
    policies ask for.

    Args:
        available: bytes that vLLM would use for KV pages.
        vllm_config: with the model loaded.
    """
    config = compat.policy_config(vllm_config)
    if not config.evicts:
        return available
    layers = list(attention_layers(vllm_config).values())
    shape = compat.model_shape(vllm_config, len(layers), layers[0].kv_cache_torch_dtype)
    return shape.left_for_kv(available, config.needs)
