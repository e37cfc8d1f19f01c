"""What a server says about its KV policy when it starts."""

from __future__ import annotations

from .config import KVPolicyConfig
from .scheduler.planner import Limits


def banner(config: KVPolicyConfig, page_size: int, max_model_len: int, num_pages: int) -> list[str]:
    """A few lines: policy, budget, bound, granularity, pages per request and in all, steering, and what is off."""
    lines = _eviction(config, page_size, max_model_len, num_pages) if config.evicts else ["SkipKV: evicts nothing"]
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


def _eviction(config: KVPolicyConfig, page_size: int, max_model_len: int, num_pages: int) -> list[str]:
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    pages, full = limits.bound_pages(page_size), -(-max_model_len // page_size)
    prompt = "protected, counts toward the budget" if config.kv_protect_prompt else "evicted like any other text"
    lines = [
        f"SkipKV: policy {config.policy!r}, granularity {config.kv_granularity}",
        f"SkipKV: budget {config.kv_budget} + buffer {config.kv_buffer} = bound {limits.bound} tokens a request, "
        f"newest {config.kv_window} always kept; prompt {prompt}",
        f"SkipKV: at most {pages} pages of {page_size} tokens a request, instead of up to {full}",
        "SkipKV: vLLM features switched off: none",
    ]
    admission = "none is ever preempted" if config.kv_admission == "bounded" else "more may start and be preempted"
    lines.append(
        f"SkipKV: {num_pages} pages hold {num_pages // pages} requests at their bound; "
        f"admission {config.kv_admission}, {admission}"
    )
    if full > num_pages:
        lines.append(
            f"SkipKV: a request that may come to hold more than {num_pages * page_size} tokens is refused: one with "
            'kv_policy "full", with a large kv_budget or with a long protected prompt'
        )
    if limits.bound >= max_model_len:
        lines.append(
            f"SkipKV: WARNING: bound {limits.bound} >= max_model_len {max_model_len}, so no request can reach it "
            "and nothing will be evicted; lower --kv-budget or raise --max-model-len"
        )
    return lines
