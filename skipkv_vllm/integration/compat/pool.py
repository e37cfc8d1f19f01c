"""Sizes of vLLM's block pool and model, and the checks that the pool is large enough."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ...capacity import (
    FULL,
    ModelShape,
    Pool,
    StateSizes,
    block_size_of,
    groups_of,
    has_states,
    kinds_of,
    others_of,
    query_size,
)
from ...config import KEEP_EVERYTHING, KVPolicyConfig, RequestOptions
from ...core.errors import KVPolicyError
from ...core.limits import DraftSlots, Limits, OtherGroups, ceil_div, most_tokens
from .cache_groups import CacheGroups, has_latents
from .flags import has_policy, policy_config
from .seams import is_public
from .speculation import num_draft_slots
from .version import located
from .watched import POOL_CHECK
from .wrap import wrap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def install_pool_check() -> None:
    """Let vLLM's start-up check require the bound instead of a whole `max_model_len`, on engines with a policy."""
    module_name, _, name = located(POOL_CHECK).partition(":")
    module = importlib.import_module(module_name)
    if is_public("size of the pool"):
        if check_pool not in module.kv_cache_memory_checks:
            module.kv_cache_memory_checks.append(check_pool)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def check(available_memory: int, get_needed_memory: Any, *args: Any) -> None:
            vllm_config = _config_of(get_needed_memory)
            if available_memory <= 0 or not check_pool(vllm_config, available_memory, get_needed_memory):
                original(available_memory, get_needed_memory, *args)

        return check

    wrap(module, name, around)


def _config_of(get_needed_memory: functools.partial[int]) -> VllmConfig:
    """Return the configuration among the arguments of vLLM's estimate; vLLM 0.33 puts its builder before it."""
    (found,) = (each for each in get_needed_memory.args if hasattr(each, "additional_config"))
    return found


def check_pool(vllm_config: VllmConfig, available: int, get_needed_memory: Callable[[], int]) -> bool:
    """Check that the KV cache holds one request at its bound.

    Args:
        vllm_config: of the engine.
        available: bytes of KV cache.
        get_needed_memory: vLLM's estimate of the bytes that a request of `max_model_len` tokens takes.

    Returns:
        False on engines that evict nothing; vLLM's own check decides there.

    Raises:
        KVPolicyError: naming the bound, its memory and the remedies.
    """
    if not has_policy(vllm_config):
        return False
    config, model = policy_config(vllm_config), vllm_config.model_config
    if not config.evicts:
        return False
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    longest = model.max_model_len
    bound = DraftSlots(num_draft_slots(vllm_config), longest).beyond(most_tokens(limits, longest))
    try:
        # vLLM estimates the memory of shorter sequences the same way.
        model.max_model_len = bound
        needed = get_needed_memory()
    finally:
        model.max_model_len = longest
    if needed > available:
        raise KVPolicyError(
            f"--kv-budget {config.kv_budget} + --kv-buffer {config.kv_buffer}: a request holds up to {bound} tokens, "
            f"which take {needed / 2**20:.1f} MiB of KV cache, but only {available / 2**20:.1f} MiB are available. "
            "Lower --kv-budget or --kv-buffer, or give the cache more memory (--gpu-memory-utilization, on CPUs "
            "VLLM_CPU_KVCACHE_SPACE, or --num-gpu-blocks-override if it is set)"
        )
    return True


def check_bound_fits(config: KVPolicyConfig, pool: Pool) -> None:
    """Check that the blocks of one request at its bound fit, where it also holds some in other groups.

    Raises:
        KVPolicyError: naming the blocks and the remedies.
    """
    if not config.evicts or not pool.others.groups or config.kv_admission == "optimistic":
        return
    demand = (
        RequestOptions.parse(None, config, pool.max_length)
        .resolve(config, 0)
        .demand(pool.max_length, pool.block_size, pool.others, pool.draft_slots)
    )
    needed = demand.most_blocks(pool.block_size)
    if needed > pool.num_blocks:
        raise KVPolicyError(
            f"--kv-budget {config.kv_budget} + --kv-buffer {config.kv_buffer}: a request holds up to {needed} blocks, "
            f"{demand.num_beside + demand.num_in_flight} of them in {pool.others.kinds}, but the KV cache has only "
            f"{pool.num_blocks}. Lower --kv-budget, --kv-buffer or --max-num-batched-tokens, or give the cache "
            "more memory (--gpu-memory-utilization, on CPUs VLLM_CPU_KVCACHE_SPACE)"
        )


class Excess(NamedTuple):
    """Why a request does not fit into the pool by itself.

    Attributes:
        most: tokens that it may hold.
        cause: why it may hold so many.
        remedy: what its sender can do.
        field: the field of the request at fault.
    """

    most: int
    cause: str
    remedy: str
    field: str = "prompt"


def check_fits_alone(
    vllm_config: VllmConfig, config: KVPolicyConfig, request: EngineCoreRequest, options: RequestOptions
) -> None:
    """Refuse a request that could outgrow the pool even if it ran alone: it could never finish.

    Raises:
        KVPolicyError: naming the tokens that it may hold, those that the pool holds and the remedies.
    """
    params, cache = request.sampling_params, vllm_config.cache_config
    if params is None or not cache.num_gpu_blocks:
        return
    # With data parallelism vLLM reports the sum of all engines' pools. One block of each is a placeholder.
    num_blocks = cache.num_gpu_blocks // vllm_config.parallel_config.data_parallel_size - 1
    prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    num_prompt, longest = len(prompt), vllm_config.model_config.max_model_len
    if not request.resumable:
        longest = min(num_prompt + (params.max_tokens or 0), longest)
    resolved = (KEEP_EVERYTHING if request.resumable else options).resolve(config, num_prompt)
    # The groups of the cache are known to the engine only, but follow from the configuration; the engine checks again.
    block_size, others = _planned_groups(vllm_config)
    drafts = DraftSlots(num_draft_slots(vllm_config), vllm_config.model_config.max_model_len)
    limits, demand = resolved.limits, resolved.demand(longest, block_size, others, drafts)
    if demand.most_blocks(block_size) <= num_blocks:
        return
    num_blocks -= demand.num_beside + demand.num_in_flight
    most, room = demand.num_tokens, max(0, num_blocks * block_size - drafts.number)
    if request.resumable:
        found = Excess(most, "a streaming-input session keeps all its tokens", "send its input as separate requests")
    elif limits is None:
        found = _excess_of_full(most, num_prompt, params.max_tokens, room, config.kv_policy)
    else:
        lookahead_only = ceil_div(most, block_size) <= num_blocks
        found = _excess_of(limits, most, num_prompt, room, lookahead_only=lookahead_only)
    raise KVPolicyError(
        f"this request may need {found.most} tokens, but the KV cache holds only {room} ({found.cause}); "
        f"{found.remedy}",
        found.field,
    )


def _planned_groups(vllm_config: VllmConfig) -> tuple[int, OtherGroups]:
    """Return the tokens of a block of the group that is compacted, and the other groups, by the configuration."""
    text_config, block_size = vllm_config.model_config.hf_text_config, vllm_config.cache_config.block_size
    ranks, has_prefix_cache = vllm_config.parallel_config.tensor_parallel_size, False
    if has_states(text_config):
        has_prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)
        block_size = block_size_of(text_config, block_size, _state_sizes(vllm_config))
    others = others_of(
        text_config,
        block_size,
        vllm_config.max_in_flight_tokens,
        vllm_config.max_concurrent_batches,
        ranks,
        has_prefix_cache=has_prefix_cache,
    )
    return groups_of(text_config, block_size, ranks).block_size, others


def _state_sizes(vllm_config: VllmConfig) -> StateSizes:
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    cache, own = vllm_config.cache_config, vllm_config.model_config.dtype.itemsize

    def size(name: str, default: int) -> int:
        return default if name == "auto" else STR_DTYPE_TO_TORCH_DTYPE[name].itemsize

    last_tokens = size(cache.mamba_cache_dtype, own)
    return StateSizes(
        ranks=vllm_config.parallel_config.tensor_parallel_size,
        last_tokens=last_tokens,
        sums=size(cache.mamba_ssm_cache_dtype, last_tokens),
        kv=size(cache.cache_dtype, own),
    )


def _excess_of_full(most: int, num_prompt: int, max_tokens: int | None, room: int, policy: str) -> Excess:
    """Return the excess of a request that keeps all its tokens."""
    remedy, field = "shorten the prompt", "prompt"
    if num_prompt < room:
        remedy, field = f"set max_tokens to at most {room - num_prompt}", "max_tokens"
    cause = f"kv_policy='full' keeps all tokens: prompt of {num_prompt} + max_tokens={max_tokens}"
    # A server that only steers has no other method.
    alternative = "" if policy == "full" else f", or use kv_policy={policy!r}"
    return Excess(most, cause, remedy + alternative, field)


def _excess_of(limits: Limits, most: int, num_prompt: int, room: int, *, lookahead_only: bool) -> Excess:
    """Return the excess of a compacted request; `lookahead_only`: without its lookahead it would fit."""
    if lookahead_only:
        held, extra = limits.lookahead
        cause = f"{held} while its prompt is compacted, plus {extra} for tokens computed ahead"
        return Excess(held + extra, cause, "shorten the prompt or lower kv_budget")
    if limits.first_bound > limits.bound:
        cause = f"kv_defer_prompt holds its whole prompt of {num_prompt} tokens"
        return Excess(most, cause, f"shorten it to at most {room - (limits.first_bound - num_prompt)} tokens")
    if limits.keep > limits.budget:
        cause = f"its prompt of {num_prompt} tokens is protected and raises its bound to {limits.bound}"
        return Excess(most, cause, f"shorten it to at most {room - limits.window - limits.buffer} tokens")
    return Excess(most, f"kv_budget={limits.budget}", f"set kv_budget to at most {room - limits.buffer}", "")


def model_shape(vllm_config: VllmConfig, groups: CacheGroups) -> ModelShape:
    """Return the model's shape on one rank."""
    model, spec = vllm_config.model_config, groups.spec
    return ModelShape(
        num_layers=len(groups.layer_names) - groups.num_draft_layers,
        num_heads=model.get_num_attention_heads(vllm_config.parallel_config),
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        element_size=model.dtype.itemsize,
        kv_element_size=spec.dtype.itemsize,
        num_pooled_layers=groups.num_pooled_layers,
        query_size=query_size(model.hf_text_config) if has_latents(spec) else None,
    )


def stored_pages(vllm_config: VllmConfig, groups: CacheGroups) -> int:
    """Return the pages of evicted tokens that an engine's host memory holds: the same number on all ranks.

    A page has the tokens of all layers, also of those of other stages of a pipeline.
    """
    parallel, shape = vllm_config.parallel_config, model_shape(vllm_config, groups)
    num_layers = shape.num_layers
    if parallel.pipeline_parallel_size > 1:
        kinds = kinds_of(vllm_config.model_config.hf_text_config)
        num_layers = kinds.count(FULL) or len(kinds)
    return shape.stored_pages(policy_config(vllm_config), num_layers, parallel.tensor_parallel_size)


def most_step_tokens(vllm_config: VllmConfig) -> int:
    """Return the tokens of the largest forward pass, padding included."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, largest_graph)


def block_pool(vllm_config: VllmConfig, groups: CacheGroups, num_blocks: int) -> Pool:
    """Return the pool of an engine with `num_blocks` blocks; one is vLLM's null block, which no request gets."""
    scheduling = vllm_config.scheduler_config
    return Pool(
        num_blocks=num_blocks - 1,
        block_size=groups.spec.block_size,
        max_num_seqs=scheduling.max_num_seqs,
        max_length=vllm_config.model_config.max_model_len,
        max_tokens=most_step_tokens(vllm_config),
        others=groups.others,
        num_draft_slots=num_draft_slots(vllm_config),
    )
