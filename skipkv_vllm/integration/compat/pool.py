"""Sizes of the pool and the model as vLLM has them; how small the pool may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...capacity import ModelShape, Pool
from ...config import KVPolicyConfig, RequestOptions
from ...core.errors import KVPolicyError
from ...core.limits import Demand, Limits, LookaheadTokens, ceil_div, most_tokens
from ...scheduler.admission import limits_of
from .public import is_public
from .wrap import wrap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

POOL_CHECK = "vllm.v1.core.kv_cache_utils:_check_enough_kv_cache_memory"


def install_pool_check(
    has_policy: Callable[[VllmConfig], bool], policy_config: Callable[[VllmConfig], KVPolicyConfig]
) -> None:
    """Let vLLM's start-up check ask for the bound instead of a whole `max_model_len`, on engines with a policy."""
    from vllm.v1.core import kv_cache_utils

    is_enough = _PoolCheck(has_policy, policy_config)
    if is_public("size of the pool"):
        if is_enough not in kv_cache_utils.kv_cache_memory_checks:
            kv_cache_utils.kv_cache_memory_checks.append(is_enough)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def check(available_memory: int, get_needed_memory: Any, *args: Any) -> None:
            vllm_config = get_needed_memory.args[0]
            if available_memory <= 0 or not is_enough(vllm_config, available_memory, get_needed_memory):
                original(available_memory, get_needed_memory, *args)

        return check

    wrap(kv_cache_utils, POOL_CHECK.partition(":")[2], around)


class _PoolCheck(NamedTuple):
    """Whether the memory is enough for a policy; False, for vLLM to decide, on engines without."""

    has_policy: Callable[[VllmConfig], bool]
    policy_config: Callable[[VllmConfig], KVPolicyConfig]

    def __call__(self, vllm_config: VllmConfig, available: int, get_needed_memory: Callable[[], int]) -> bool:
        if not self.has_policy(vllm_config):
            return False
        _check_pool(vllm_config, self.policy_config(vllm_config), available, get_needed_memory)
        return True


def _check_pool(
    vllm_config: VllmConfig, config: KVPolicyConfig, available: int, get_needed_memory: Callable[[], int]
) -> None:
    model = vllm_config.model_config
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    longest, bound = model.max_model_len, most_tokens(limits, model.max_model_len)
    try:
        # vLLM estimates the memory of shorter sequences the same way.
        model.max_model_len = bound
        needed = get_needed_memory()
    finally:
        model.max_model_len = longest
    if needed > available:
        raise KVPolicyError(
            f"--kv-budget {config.kv_budget} + --kv-buffer {config.kv_buffer}: a request holds up to {bound} tokens, "
            f"which take {needed / 2**20:.1f} MiB of KV cache, and {available / 2**20:.1f} MiB are there. Lower "
            "--kv-budget or --kv-buffer, or give the cache more memory (--gpu-memory-utilization, on CPUs "
            "VLLM_CPU_KVCACHE_SPACE, or --num-gpu-blocks-override where it is set)"
        )


def check_fits_alone(
    vllm_config: VllmConfig, config: KVPolicyConfig, request: EngineCoreRequest, options: RequestOptions
) -> None:
    """Refuse a request that could outgrow the pool even if it ran alone: it could never be finished.

    Raises:
        KVPolicyError: naming what the request may hold, what the pool has and the remedies.
    """
    params, cache = request.sampling_params, vllm_config.cache_config
    if params is None or not cache.num_gpu_blocks:
        return
    # With data parallelism vLLM reports the sum of all engines' pools. One page of each is a placeholder.
    num_pages = cache.num_gpu_blocks // vllm_config.parallel_config.data_parallel_size - 1
    prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    num_prompt, longest = len(prompt), vllm_config.model_config.max_model_len
    limits = None
    if not request.resumable:
        longest = min(num_prompt + (params.max_tokens or 0), longest)
        limits = limits_of(options, config, num_prompt)
    most, lookahead = most_tokens(limits, longest), LookaheadTokens() if limits is None else limits.lookahead
    if Demand(most, 0, lookahead).num_blocks(cache.block_size) <= num_pages:
        return
    room, field = num_pages * cache.block_size, "prompt"
    if request.resumable:
        cause, remedy = "a streaming-input session keeps everything", "send its input as separate requests"
    elif limits is None:
        cause = f"kv_policy='full' keeps everything: prompt of {num_prompt} + max_tokens={params.max_tokens}"
        remedy = "shorten the prompt"
        if num_prompt < room:
            remedy, field = f"set max_tokens to at most {room - num_prompt}", "max_tokens"
        remedy += f", or use kv_policy={config.kv_policy!r}"
    elif ceil_div(most, cache.block_size) <= num_pages:
        most, (held, scratch) = sum(lookahead), lookahead
        cause = f"while its prompt is compacted {held}, and pages for {scratch} to compute tokens ahead"
        remedy = "shorten the prompt or lower kv_budget"
    elif limits.first_bound > limits.bound:
        cause = f"kv_defer_prompt holds its prompt of {num_prompt} tokens whole"
        remedy = f"shorten it to at most {room - (limits.first_bound - num_prompt)} tokens"
    elif limits.keep > limits.budget:
        cause = f"its prompt of {num_prompt} tokens is protected and raises its bound to {limits.bound}"
        remedy = f"shorten it to at most {room - limits.window - limits.buffer} tokens"
    else:
        cause, remedy, field = f"kv_budget={limits.budget}", f"set kv_budget to at most {room - limits.buffer}", ""
    raise KVPolicyError(
        f"this request may come to hold {most} tokens and the KV cache holds {room} ({cause}); {remedy}", field
    )


def model_shape(vllm_config: VllmConfig, num_layers: int, kv_dtype: torch.dtype) -> ModelShape:
    """The model as one rank holds it, with `num_layers` attention layers whose caches have `kv_dtype`."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return ModelShape(
        num_layers=num_layers,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        element_size=model.dtype.itemsize,
        kv_element_size=kv_dtype.itemsize,
    )


def page_pool(vllm_config: VllmConfig, num_blocks: int) -> Pool:
    """The pages of an engine with `num_blocks` blocks; one of them is vLLM's null block, which nobody gets."""
    scheduling = vllm_config.scheduler_config
    return Pool(
        num_blocks=num_blocks - 1,
        block_size=vllm_config.cache_config.block_size,
        max_num_seqs=scheduling.max_num_seqs,
        max_length=vllm_config.model_config.max_model_len,
        max_tokens=scheduling.max_num_batched_tokens,
    )
