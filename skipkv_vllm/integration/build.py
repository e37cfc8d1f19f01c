"""Build the runtime of a worker from vLLM's configuration and loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.tokenizers import cached_tokenizer_from_config

from ..capacity import Pool, most_rows, reserved_rows
from ..config import KVPolicyConfig
from ..core.errors import KVPolicyError
from ..core.limits import STORED_PAGE
from ..core.needs import ACCUMULATED, REPEATS, Need
from ..ops.paging import FP8_CACHES, Layout, PagedCache, cpu_layout
from ..policies.gates import Gates
from ..sentences import build_tables
from ..steering import tokenizer_digest
from ..steering.tables import build_thought_tables
from ..trace.writer import TraceWriter
from ..worker.cache import query_bytes, temporary_bytes
from ..worker.ranks import Ranks
from ..worker.recall import EXCHANGE_BYTES
from ..worker.requests import Rows
from ..worker.runtime import EvictionRuntime
from ..worker.signals import Signals
from ..worker.signals.attention_mass import AttentionMass
from ..worker.signals.gates import TokenGates, attention_blocks
from ..worker.signals.latent_queries import LatentQueryRing
from ..worker.signals.queries import QueryRing
from ..worker.signals.segments import SegmentSparsity
from ..worker.signals.sentence_tracker import SentenceTracker
from ..worker.signals.sentences import Sentences
from ..worker.steering import Steering, decoder_layers
from . import compat
from .forward import LookaheadDecoder

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.skipkv")


def build_runtime(vllm_config: VllmConfig, model: nn.Module, device: torch.device) -> EvictionRuntime:
    """Hook up what the model's compiled code contains: gates and steering. `bind_cache` adds the state of requests.

    Call it after the model is loaded and before memory is profiled, so that vLLM leaves room for it, and in a memory
    pool that survives sleep level 2.
    """
    config = compat.policy_config(vllm_config)
    compat.mark_draft_layers(vllm_config, model)
    if config.evicts:
        layers = compat.evicting_layers(vllm_config) | compat.draft_layers(vllm_config)
        compat.check_attention(layer.impl for layer in layers.values())
    ranks = join_ranks(vllm_config, device)
    gates = None
    if config.gates is not None:
        gates = _build_gates(config.gates, vllm_config, ranks, device)
        gates.attach(attention_blocks(model, compat.evicting_layers(vllm_config)))
    steering = _build_steering(vllm_config, model, device) if config.steers else None
    trace = None
    if config.kv_trace_dir is not None:
        trace = TraceWriter(config.kv_trace_dir, vllm_config.parallel_config.rank)
    return EvictionRuntime(config, Rows(0), Signals(gates=gates), device, ranks=ranks, trace=trace, steering=steering)


def _build_signals(
    vllm_config: VllmConfig, device: torch.device, ranks: Ranks, num_rows: int, gates: TokenGates | None
) -> Signals:
    config = compat.policy_config(vllm_config)
    needs, ring = config.needs, None
    sentences = attention_mass = segments = None
    if needs & Need.QUERIES:
        ring = _build_ring(vllm_config, device, num_rows)
    if needs & Need.SENTENCES:
        # Sentences are compared by last hidden states, which a pipeline has at its end.
        tracker = _build_tracker(vllm_config, device, num_rows) if get_pp_group().is_last_rank else None
        sentences = Sentences(tracker, ranks)
    if needs & ACCUMULATED:
        assert ring is not None
        attention_mass = AttentionMass(ring, config.kv_buffer, needs)
    if needs & Need.SEGMENTS:
        assert ring is not None
        segments = SegmentSparsity(ring, config.kv_window, ranks)
    return Signals(ring, sentences, attention_mass, segments, gates)


def _build_ring(vllm_config: VllmConfig, device: torch.device, num_rows: int) -> QueryRing:
    config = compat.policy_config(vllm_config)
    layers = list(compat.evicting_layers(vllm_config).values())
    sizes: dict[str, Any] = {
        "num_rows": num_rows,
        "window": config.kv_window,
        "num_kept": config.num_queries,
        "max_tokens": compat.most_step_tokens(vllm_config),
        "dtype": vllm_config.model_config.dtype,
        "device": device,
    }
    if vllm_config.model_config.use_mla:
        return LatentQueryRing(layers, **sizes)
    ring = QueryRing(
        num_layers=len(layers),
        num_heads=layers[0].num_heads,
        head_size=layers[0].head_size,
        logit_scales=[layer.impl.scale for layer in layers],
        **sizes,
    )
    for i, layer in enumerate(layers):
        ring.attach(i, layer.impl)
    return ring


def _build_tracker(vllm_config: VllmConfig, device: torch.device, num_rows: int) -> SentenceTracker:
    config, model_config = compat.policy_config(vllm_config), vllm_config.model_config
    options = config.policy.sentence_options
    return SentenceTracker(
        build_tables(cached_tokenizer_from_config(model_config), options.compat),
        options,
        num_rows=num_rows,
        max_length=model_config.max_model_len,
        hidden_size=model_config.get_hidden_size() if config.needs & Need.HIDDEN else 0,
        vocab_size=model_config.get_vocab_size(),
        dtype=model_config.dtype,
        device=device,
        keeps_text=bool(config.needs & Need.RECURRENCE),
    )


def join_ranks(vllm_config: VllmConfig, device: torch.device) -> Ranks:
    """Join the ranks of this engine and return this worker's place. Every worker must call it, at the same point."""
    config, parallel = compat.policy_config(vllm_config), vllm_config.parallel_config
    layers = compat.evicting_layers(vllm_config)
    if not layers and parallel.pipeline_parallel_size == 1:
        raise compat.refusal(
            "models without a layer of full attention", "only such a layer's KV grows with the text", compat.OTHER_MODEL
        )
    if not layers:
        raise KVPolicyError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} leaves a stage without a layer of full "
            "attention, whose KV could be compacted; use fewer stages"
        )
    num_stages, width = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    num_ranks = num_stages * width
    # A kv head lies on several ranks if there are more ranks than heads.
    first = next(iter(layers.values()))
    first_head = get_tp_group().rank_in_group * compat.total_kv_heads(vllm_config.model_config) // width
    numbers = tuple(map(extract_layer_index, layers))
    exchanges = config.kv_granularity == "sentence" or bool(config.needs & Need.SEGMENTS)
    exchanges = exchanges or config.recalls or (num_stages > 1 and bool(config.needs & REPEATS))
    if num_ranks == 1 or not exchanges:
        return Ranks(layers=numbers, first_head=first_head, num_stages=num_stages)
    # A group of our own, because vLLM's sends between stages may wait for our exchange. Its world may hold several
    # engines (data parallelism of mixture-of-experts models), and all of them must create all groups.
    own = None
    for start in range(0, dist.get_world_size(), num_ranks):
        members = list(range(start, start + num_ranks))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            own, source = group, members[-width]
    # This also opens the connections, so that vLLM's memory profiling counts them.
    count = torch.tensor([len(layers) * first.num_kv_heads], dtype=torch.int64, device=device)
    counts = [torch.empty_like(count) for _ in range(num_ranks)]
    dist.all_gather(counts, count, group=own)
    pairs = torch.cat(counts).tolist()
    return Ranks(sum(pairs), max(pairs), numbers, first_head, num_stages, own, source)


def _build_gates(learned: Gates, vllm_config: VllmConfig, ranks: Ranks, device: torch.device) -> TokenGates:
    model_config, layers = vllm_config.model_config, list(compat.evicting_layers(vllm_config).values())
    return TokenGates(
        [learned.layers[number] for number in ranks.layer_numbers(len(layers))],
        first_head=ranks.first_head,
        num_heads=layers[0].num_kv_heads,
        activation=getattr(model_config.hf_text_config, "hidden_act", "unknown"),
        max_tokens=compat.most_step_tokens(vllm_config),
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
        num_rows=scheduling.max_num_seqs,
        max_tokens=compat.most_step_tokens(vllm_config),
        device=device,
        has_drafts=vllm_config.speculative_config is not None,
    )
    steering.attach(decoder_layers(model, num_layers))
    return steering


def bind_cache(runner: Any, kv_cache_config: KVCacheConfig, prompt: Callable[[str], Sequence[int]]) -> None:
    """Give the runtime of a model runner the KV cache once vLLM has allocated it; `prompt`: see `LookaheadDecoder`."""
    runtime: EvictionRuntime = runner.runtime
    if not runtime.config.evicts:
        return
    vllm_config, layers = runner.vllm_config, compat.evicting_layers(runner.vllm_config)
    groups = compat.cache_groups(vllm_config, kv_cache_config.kv_cache_groups)
    _allocate_rows(runtime, vllm_config, compat.block_pool(vllm_config, groups, kv_cache_config.num_blocks))
    names = set(groups.layer_names)
    bound = [layer for name, layer in layers.items() if name in names]
    cache = PagedCache.of([_pages(layer) for layer in bound], _layout(bound[0]))
    decoder, ring = None, runtime.signals.queries
    if runtime.config.needs & Need.LOOKAHEAD:
        assert ring is not None
        decoder = LookaheadDecoder(runner, ring, prompt)
    own_drafts = [layer for name, layer in compat.draft_layers(vllm_config).items() if name in names]
    drafts = [PagedCache.of([_pages(layer)], _layout(layer)) for layer in own_drafts]
    num_stored = compat.stored_pages(vllm_config, groups) if runtime.config.recalls else 0
    runtime.bind_cache(
        *(cache, groups.spec.block_size, _key_scales(bound), decoder, _sink_logits_of(bound), drafts),
        _token_store(num_stored, cache),
    )


def _token_store(number: int, pages: PagedCache) -> Tensor | None:
    """Allocate so many pages for evicted tokens in host memory, as the device sees them; None for none."""
    if not number:
        return None
    _, heads, _, width = pages.caches[0].shape
    shape = (number, len(pages.caches), heads, STORED_PAGE, width)
    return compat.host_memory(shape, pages.caches[0].dtype, pages.caches[0].device)


def _allocate_rows(runtime: EvictionRuntime, vllm_config: VllmConfig, pool: Pool) -> None:
    """Allocate state for as many requests as the pool can hold; the scheduler counts the same."""
    number = most_rows(runtime.config, pool)
    signals = _build_signals(vllm_config, runtime.device, runtime.ranks, number, runtime.signals.gates)
    runtime.allocate(Rows(number), signals)
    logger.info(
        "SkipKV: %.1f MiB for recorded queries, sentences and gates of at most %d requests%s",
        (signals.nbytes + (0 if runtime.steering is None else runtime.steering.nbytes)) / 2**20,
        number,
        "; sleep mode moves them to host memory" if vllm_config.model_config.enable_sleep_mode else "",
    )


def _pages(layer: Any) -> Tensor:
    """Return a layer's pages, viewed with the dtype of their content."""
    pages: Tensor = layer.kv_cache
    if pages.dim() == 3:
        pages = pages.unsqueeze(1)  # MLA leaves out the one head
    if pages.element_size() > 1:
        return pages
    # Set even if the checkpoint, not a flag, chose the dtype.
    if layer.kv_cache_dtype not in FP8_CACHES:
        raise KVPolicyError(
            f"--kv-policy does not support this model's {layer.kv_cache_dtype!r} KV cache (known: "
            f"{', '.join(FP8_CACHES)}); use --kv-cache-dtype bfloat16, or start without --kv-policy"
        )
    return pages.view(FP8_CACHES[layer.kv_cache_dtype])


def _key_scales(layers: list[Any]) -> Tensor | None:
    """Return float32 `[layers, H]` by which stored keys must be multiplied; None if all of them are 1."""
    if layers[0].kv_cache.element_size() > 1:
        return None
    # One number a layer, or one a head. Waits for the device, but only here.
    scales = torch.stack([layer._k_scale.float().flatten().expand(layer.num_kv_heads) for layer in layers])
    return None if bool((scales == 1).all()) else scales


def _sink_logits_of(layers: list[Any]) -> Callable[[], Tensor] | None:
    """Return a function that reads the sinks' logits, float32 `[layers, Hq]`; None if no layer has a sink."""

    def own() -> list[Tensor | None]:
        # Backends replace the tensor by one of another dtype, also at the first step.
        return [getattr(layer.impl, "sinks", None) for layer in layers]

    if all(sinks is None for sinks in own()):
        return None
    without = torch.full((layers[0].num_heads,), -torch.inf, device=layers[0].kv_cache.device)

    def read() -> Tensor:
        # Converted together: a launch for each layer would take time at every compaction.
        return torch.stack([without if sinks is None else sinks for sinks in own()]).float()

    return read


def _layout(layer: Any) -> Layout:
    if layer.attn_backend.is_mla():
        return Layout.LATENT
    # By the class that reads the pages, because a backend registered in place of another keeps that one's name.
    if any(cls.__name__ == "CPUAttentionBackendImpl" for cls in type(layer.impl).__mro__):
        return cpu_layout(layer.isa)  # set by vLLM when it builds the attention metadata
    return Layout.ROWS


def profile_compactions(vllm_config: VllmConfig, device: torch.device) -> None:
    """Take the memory of a step's compactions for a moment, so that vLLM's profiling counts it.

    Call it after the forward pass that is profiled: compactions run before a step's forward pass, so the larger of the
    two needs counts.
    """
    config = compat.policy_config(vllm_config)
    if config.evicts:
        layers = list(compat.evicting_layers(vllm_config).values())
        longest = min(config.kv_budget + config.kv_buffer, vllm_config.model_config.max_model_len)
        queries = _most_queries(config) * query_bytes(
            len(layers),
            layers[0].num_heads,
            layers[0].head_size,
            layers[0].get_kv_cache_spec(vllm_config).dtype.itemsize,
        )
        size = temporary_bytes(len(layers), layers[0].num_kv_heads, longest, queries)
        if config.recalls:
            # Stored tokens are not bounded by the budget.
            size += EXCHANGE_BYTES * len(layers) * layers[0].num_kv_heads * vllm_config.model_config.max_model_len
        torch.empty(size, dtype=torch.uint8, device=device)


def _most_queries(config: KVPolicyConfig) -> int:
    """Return the most queries of a request that a launch gets: recent ones, and those of tokens computed ahead."""
    if not config.needs & Need.QUERIES:
        return 0
    plans = [each.lookahead_plan for each in config.policies]
    # A question is at most as long as the window.
    ahead = max(0 if plan is None else max(plan.num_tokens, config.kv_window) for plan in plans)
    return config.num_queries + ahead


def left_for_kv(available: int, vllm_config: VllmConfig) -> int:
    """Return the memory left for KV beside the state of requests and the sidecars of tokens.

    Args:
        available: bytes that vLLM would use for KV.
        vllm_config: configuration of an engine whose model is loaded.
    """
    config = compat.policy_config(vllm_config)
    if not config.evicts:
        return available
    groups = compat.cache_groups(vllm_config)
    shape, pool = compat.model_shape(vllm_config, groups), compat.block_pool(vllm_config, groups, 1)
    if config.recalls:
        available -= shape.sketch_bytes(compat.stored_pages(vllm_config, groups))
    state = shape.row_bytes(config, reserved_rows(config, shape, available, pool), pool)
    return shape.left_for_kv(max(available - state, 0), config.needs)
