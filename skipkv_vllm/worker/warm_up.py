"""Run every operator once before the first request: GPUs load native modules and compile kernels when they are used.

It plays a few steps of requests that do not exist, through the same hooks as a real step, so it cannot miss an operator
that a real one calls. It must run after the KV cache is bound and before graphs are captured.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.limits import STORED_PAGE, ceil_div
from ..core.needs import FROM_RECENT_QUERIES, Need
from ..core.orders import Accumulation, Compaction, Started, SteeredRequest, StepOrders, Stored, Strength, Swap
from ..ops import STATE
from ..policies import Policy
from .batch import StepBatch
from .runtime import EvictionRuntime
from .signals.base import ForwardOutput

NAMES = ("skipkv warm-up 1", "skipkv warm-up 2")
"""One request takes another path through some operators than several do."""


def warm_up(runtime: EvictionRuntime, *, hidden_size: int, dtype: torch.dtype, max_length: int) -> None:
    """Play the life of two requests with each of the server's methods, in blocks that no request holds yet.

    Every rank must call it. What the blocks and the buffers of the requests hold afterwards is arbitrary, as between
    two requests.

    Args:
        runtime: bound to the KV cache.
        hidden_size, dtype: of the model's hidden states.
        max_length: tokens of the longest request.
    """
    bound = runtime.config.kv_budget + runtime.config.kv_buffer
    number = 0 if runtime.steering is None else runtime.steering.num_rows
    if runtime.config.evicts:
        number = runtime.num_rows
        if bound >= max_length:
            return  # no request will be compacted
        number = min(number, (runtime.cache.num_blocks - 1) // ceil_div(bound, runtime.cache.block_size))
    trace, runtime.trace = runtime.trace, None
    try:
        for names in (NAMES[:1], NAMES)[:number]:
            for policy in runtime.config.policies:
                _play(runtime, policy, names, hidden_size, dtype)
    finally:
        runtime.trace = trace
        runtime.reset_counts()
        runtime.prepare_dummy()


def _play(
    runtime: EvictionRuntime, policy: Policy, names: tuple[str, ...], hidden_size: int, dtype: torch.dtype
) -> None:
    config = runtime.config
    keep, bound = config.kv_budget, config.kv_budget + config.kv_buffer
    # Block 0 is vLLM's placeholder.
    each = ceil_div(bound, runtime.cache.block_size) if config.evicts else 0
    blocks = {name: list(range(1 + i * each, 1 + (i + 1) * each)) for i, name in enumerate(names)}
    strength = Strength(1.0, 0.0, 1.0)
    steered = [SteeredRequest(name, 0, [0] * len(STATE), strength) for name in names] if config.steers else []
    # None reaches the end of its prompt, from where tokens may be computed ahead.
    started = [Started(name, policy.name, bound + 2, 0, 0) for name in names] if config.evicts else []
    runtime.begin_step(StepOrders([], started, steered=steered), (), ())
    _forward(runtime, names, start=0, count=2, hidden_size=hidden_size, dtype=dtype)
    _forward(runtime, names, start=2, count=1, hidden_size=hidden_size, dtype=dtype)
    if config.evicts:
        runtime.begin_step(StepOrders([], [], _accumulations(runtime, policy, names, blocks, bound)), (), ())
        target, stored = ceil_div(keep, runtime.cache.block_size), _stored(runtime, names, bound)
        compactions = [
            Compaction(name, bound, bound, keep, blocks[name], blocks[name][:target], 0, stored=stored.get(name))
            for name in names
        ]
        runtime.begin_step(StepOrders(compactions, []), (), ())
        # The lengths of a compacted request are corrected.
        _forward(runtime, names, start=bound, count=1, hidden_size=hidden_size, dtype=dtype)
        swaps = [
            Swap(name, bound + 1, keep + 1, blocks[name], each._replace(begin=bound)) for name, each in stored.items()
        ]
        runtime.begin_step(StepOrders([], [], swaps=swaps), (), ())
    runtime.begin_step(None, names, ())


def _stored(runtime: EvictionRuntime, names: tuple[str, ...], bound: int) -> dict[str, Stored]:
    """Return tokens of each request in host memory, by name; none if nothing comes back or there is too little."""
    config, each = runtime.config, ceil_div(bound, STORED_PAGE)
    most = int(config.kv_recall_share * (config.kv_budget - config.kv_window))
    if not most or runtime.num_stored_pages < len(names) * each:
        return {}
    pages = {name: list(range(i * each, (i + 1) * each)) for i, name in enumerate(names)}
    return {name: Stored(0, 0, bound, pages[name], most) for name in names}


def _accumulations(
    runtime: EvictionRuntime, policy: Policy, names: tuple[str, ...], blocks: dict[str, list[int]], bound: int
) -> list[Accumulation]:
    if not policy.needs & FROM_RECENT_QUERIES:
        return []
    config = runtime.config
    if policy.needs & Need.SEGMENTS:
        # The first segment ends here.
        length, num_queries = policy.segment_options.length, config.kv_window
    else:
        length, num_queries = bound, min(config.num_queries, bound)
    return [Accumulation(name, length, min(length, bound), num_queries, blocks[name]) for name in names]


def _forward(
    runtime: EvictionRuntime, names: tuple[str, ...], *, start: int, count: int, hidden_size: int, dtype: torch.dtype
) -> None:
    """Call the hooks around a forward pass of `count` tokens of each request, without the pass itself."""
    device, number = runtime.device, len(names)
    batch = StepBatch(list(names), np.full(number, count), np.full(number, start), number * count)
    token_ids = torch.zeros(batch.num_tokens, dtype=torch.int32, device=device)
    runtime.steer(batch, token_ids)
    runtime.prepare(batch)
    slots = torch.zeros(batch.num_tokens, dtype=torch.int64, device=device)
    hidden = torch.zeros(batch.num_tokens, hidden_size, dtype=dtype, device=device)
    runtime.finish_forward(ForwardOutput(token_ids, slots, hidden, _no_logits))


def _no_logits() -> Tensor:
    raise AssertionError("no prompt ends in the warm-up")
