"""Requests at their bound on a real runtime without an engine: what a compaction costs at the sizes of a model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import ceil_div
from skipkv_vllm.core.needs import ACCUMULATED
from skipkv_vllm.core.orders import Accumulation, Compaction, Started, StepOrders
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.signals.base import ForwardOutput
from tests.small_engine import Shape, pages
from tests.small_engine.worker import make_runtime

PROMPT = 64


class Attention:
    """An attention implementation that only hands its queries to the ring."""

    def forward(self, layer: object, query: Tensor) -> Tensor:
        """Return the queries."""
        return query


class Requests:
    """R requests that hold `budget + buffer` tokens each, with random keys and values.

    Args:
        policy: their method.
        shape: of model and cache; see `shape_for`.
        number: R.
        budget, buffer: of each.

    Attributes:
        runtime: the runtime.
    """

    def __init__(self, policy: str, shape: Shape, number: int, budget: int, buffer: int) -> None:
        self._shape, self._budget, self._buffer = shape, budget, buffer
        self.config = KVPolicyConfig.parse({"kv_policy": policy, "kv_budget": budget, "kv_buffer": buffer})
        cache = pages.allocate(shape)
        for each in cache.caches:
            each.normal_()
        self.runtime = make_runtime(self.config, shape, cache)
        self._attention = [Attention() for _ in range(shape.layers)]
        if self.runtime.signals.queries is not None:
            for i, each in enumerate(self._attention):
                self.runtime.signals.queries.attach(i, each)
        per_request = ceil_div(budget + buffer, shape.block_size)
        self._blocks = {f"r{i}": list(range(1 + i * per_request, 1 + (i + 1) * per_request)) for i in range(number)}
        self._ordinal = 0

    def start(self) -> None:
        """Start all requests and read their newest tokens."""
        started = [Started(name, self.config.kv_policy, PROMPT, PROMPT, PROMPT) for name in self._blocks]
        self.runtime.begin_step(StepOrders([], started), (), ())
        self.advance()

    def advance(self) -> None:
        """Run the hooks of a step around the last tokens before the next compaction, as many as the ring keeps."""
        number, count, shape = len(self._blocks), self.config.num_queries, self._shape
        starts = np.full(number, self._budget + (self._ordinal + 1) * self._buffer - count)
        self.runtime.prepare(StepBatch(list(self._blocks), np.full(number, count), starts, number * count))
        total = number * count
        for attention in self._attention:
            query = torch.randn(total, shape.query_heads, shape.head_size, device=shape.device)
            attention.forward(None, query.to(shape.dtype))
        token_ids = torch.randint(shape.vocabulary, (total,), dtype=torch.int32, device=shape.device)
        slots = torch.zeros(total, dtype=torch.int64, device=shape.device)
        hidden = torch.randn(total, shape.width, device=shape.device).to(shape.dtype)
        self.runtime.finish_forward(ForwardOutput(token_ids, slots, hidden))

    def orders(self) -> StepOrders:
        """Return the orders of the next compaction of all requests."""
        resident = self._budget + self._buffer
        length = resident + self._ordinal * self._buffer
        kept = ceil_div(self._budget, self._shape.block_size)
        compactions = [
            Compaction(name, length, resident, self._budget, blocks, blocks[:kept], self._ordinal)
            for name, blocks in self._blocks.items()
        ]
        accumulations = []
        if self.config.needs & ACCUMULATED:
            count = min(self.config.num_queries, resident)
            accumulations = [
                Accumulation(name, length, resident, count, blocks) for name, blocks in self._blocks.items()
            ]
        return StepOrders(compactions, [], accumulations)

    def compact(self) -> dict[str, Any]:
        """Compact all requests in one step; `advance` must follow before the next time.

        Returns:
            `host_ms`, until the host may go on, and `total_ms`, until the device is done.
        """
        orders = self.orders()
        self._wait()
        start = time.perf_counter()
        self.runtime.begin_step(orders, (), ())
        host = time.perf_counter() - start
        self._wait()
        total = time.perf_counter() - start
        self._ordinal += 1
        return {"host_ms": round(host * 1e3, 3), "total_ms": round(total * 1e3, 3)}

    def _wait(self) -> None:
        if self._shape.device.type == "cuda":
            torch.cuda.synchronize()
