"""What a server says about its KV policy when it starts."""

from __future__ import annotations

from .capacity import Capacity
from .config import KVPolicyConfig
from .core.limits import Limits


def banner(config: KVPolicyConfig, capacity: Capacity | None, max_model_len: int, *, is_async: bool) -> list[str]:
    """A few lines: policy, budget, bound, granularity, what fits, scheduling, grouping, steering, and what is off.

    Args:
        config: an active policy, steering, or both.
        capacity: what fits; None where nothing is evicted.
        max_model_len: longest request.
        is_async: whether the scheduler is asynchronous.
    """
    lines = ["SkipKV: evicts nothing"] if capacity is None else _eviction(config, capacity, max_model_len)
    lines.append(
        f"SkipKV: asynchronous scheduling is {'on' if is_async else 'off'}, as vLLM is configured; its warning about a "
        "custom scheduler class does not apply"
    )
    if config.kv_batch_grouping != "off":
        lines.append(
            f"SkipKV: waiting requests grouped by prompt length, {config.kv_grouping_width} tokens a group; from "
            f"{config.kv_grouping_max_wait:g} s past its turn a request is no longer overtaken"
        )
    if config.kv_prefix_eviction == "guard":
        lines.append("SkipKV: cached prefixes give way by Guard instead of LRU")
    if config.steers:
        most = "" if config.kv_steering_alpha_max is None else f", at most {config.kv_steering_alpha_max}"
        lines.append(
            f"SkipKV: steering vectors {', '.join(config.kv_steering_vectors)}, default {config.kv_steering_default}; "
            f"alpha {config.kv_steering_alpha0} + {config.kv_steering_gamma} a thought that is no execution{most}, "
            f"brought up to date every {config.kv_steering_interval} positions; rules {config.kv_steering_compat}"
        )
    if config.kv_trace_dir:
        lines.append(f"SkipKV: writing one trace per request to {config.kv_trace_dir}")
    return lines


def _eviction(config: KVPolicyConfig, capacity: Capacity, max_model_len: int) -> list[str]:
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    prompt = "protected, counts toward the budget" if config.kv_protect_prompt else "evicted like any other text"
    if config.policy.compacts_prompt:
        prompt = "compacted as soon as it is computed" + (", whole until then" if config.kv_defer_prompt else "")
    elif config.kv_defer_prompt:
        prompt += f", from {config.kv_window} tokens after its end on"
    admission = "none is ever preempted" if config.kv_admission == "bounded" else "more may start and be preempted"
    lines = [
        f"SkipKV: policy {config.policy!r}, granularity {config.kv_granularity}",
        f"SkipKV: budget {config.kv_budget} + buffer {config.kv_buffer} = bound {limits.bound} tokens a request, "
        f"newest {config.kv_window} always kept; prompt {prompt}",
        *(f"SkipKV: {line}" for line in capacity.lines()),
        "SkipKV: vLLM features switched off: none",
        f"SkipKV: admission {config.kv_admission}, {admission}",
    ]
    if capacity.request_pages_full > capacity.pages:
        lines.append(
            f"SkipKV: a request that may come to hold more than {capacity.pages * capacity.page_size} tokens is "
            'refused: one with kv_policy "full", with a large kv_budget or with a long protected prompt'
        )
    if limits.bound >= max_model_len:
        lines.append(
            f"SkipKV: WARNING: bound {limits.bound} >= max_model_len {max_model_len}, so no request can reach it "
            "and nothing will be evicted; lower --kv-budget or raise --max-model-len"
        )
    return lines
