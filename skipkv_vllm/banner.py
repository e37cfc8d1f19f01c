"""Lines about the KV policy that a server logs at start-up."""

from __future__ import annotations

from .capacity import Capacity
from .config import KVPolicyConfig
from .core.limits import Limits


def banner(
    config: KVPolicyConfig, capacity: Capacity | None, max_model_len: int, num_stored: int = 0, *, is_async: bool
) -> list[str]:
    """Describe the policy, the capacity, scheduling, steering and traces, one line each.

    Args:
        config: a configuration that evicts, steers or does both.
        capacity: how many requests fit; None if nothing is evicted.
        max_model_len: longest request.
        num_stored: tokens for which there is host memory, so that they can come back.
        is_async: whether the scheduler is asynchronous.
    """
    lines = ["SkipKV: evicts nothing"] if capacity is None else _eviction(config, capacity, max_model_len)
    lines.append(
        f"SkipKV: asynchronous scheduling is {'on' if is_async else 'off'}, as vLLM is configured; its warning about a "
        "custom scheduler class does not apply"
    )
    if config.recalls:
        lines.append(
            f"SkipKV: {config.kv_recall_memory:g} GiB of host memory hold {num_stored:,} tokens of all requests; those "
            f"that recent queries ask for come back, at each compaction and every {config.kv_recall_interval} tokens"
        )
    if config.kv_batch_grouping != "off":
        lines.append(
            f"SkipKV: waiting requests are grouped by prompt length, at most {config.kv_grouping_width} tokens apart; "
            f"a request {config.kv_grouping_max_wait:g} s or more past its turn is not overtaken"
        )
    if config.kv_prefix_eviction == "guard":
        lines.append("SkipKV: the prefix cache evicts blocks by Guard instead of LRU")
    if config.steers:
        most = "" if config.kv_steering_alpha_max is None else f", at most {config.kv_steering_alpha_max}"
        lines.append(
            f"SkipKV: steering vectors {', '.join(config.kv_steering_vectors)}, default {config.kv_steering_default}; "
            f"alpha {config.kv_steering_alpha0} + {config.kv_steering_gamma} per non-execution thought{most}, updated "
            f"every {config.kv_steering_interval} positions; {config.kv_steering_compat} rules"
        )
    if config.kv_trace_dir:
        lines.append(f"SkipKV: writing one trace per request to {config.kv_trace_dir}")
    return lines


def _eviction(config: KVPolicyConfig, capacity: Capacity, max_model_len: int) -> list[str]:
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    prompt = "protected, counts toward the budget" if config.kv_protect_prompt else "evicted like any other text"
    if config.policy.compacts_prompt:
        prompt = "compacted as soon as it is computed" + (", held whole until then" if config.kv_defer_prompt else "")
    elif config.kv_defer_prompt:
        prompt += f", but not until {config.kv_window} tokens after its end"
    admission = (
        "no request is preempted for lack of blocks"
        if config.kv_admission == "bounded"
        else "more requests start, and some may be preempted"
    )
    lines = [
        f"SkipKV: policy {config.policy!r}, granularity {config.kv_granularity}",
        f"SkipKV: budget {config.kv_budget} + buffer {config.kv_buffer} = bound {limits.bound} tokens per request, "
        f"newest {config.kv_window} always kept; prompt {prompt}",
        *(f"SkipKV: {line}" for line in capacity.lines()),
        f"SkipKV: admission {config.kv_admission}, {admission}",
    ]
    if capacity.length > capacity.room:
        lines.append(
            f"SkipKV: a request that may hold more than {capacity.room} tokens is "
            'refused: one with kv_policy "full", with a large kv_budget or with a long protected prompt'
        )
    if limits.bound >= max_model_len:
        lines.append(
            f"SkipKV: WARNING: bound {limits.bound} >= max_model_len {max_model_len}, so no request can reach it "
            "and nothing will be evicted; lower --kv-budget or raise --max-model-len"
        )
    return lines
