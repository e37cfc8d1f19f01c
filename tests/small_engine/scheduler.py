"""The scheduler of the small engine: the real controller of evictions, with the little of vLLM's scheduler it needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.orders import StepOrders
from skipkv_vllm.scheduler.eviction import EvictionController
from skipkv_vllm.scheduler.requests import RequestRecord, Text
from skipkv_vllm.scheduler.stats import EvictionStats
from tests.small_engine.blocks import Blocks
from tests.small_engine.shape import Shape
from tests.small_engine.traffic import Arrival, Traffic


@dataclass
class Running:
    """A request that has arrived.

    Attributes:
        arrival: what is known of it from the start.
        record: of the scheduler's side.
        row: where its text and its tokens lie; -1 while it waits.
        num_computed_tokens: tokens computed so far.
        num_known: tokens whose ids are known.
        count: tokens of this step.
        shared_from: row of the request whose first blocks it took over when it started, and how many tokens they have.
    """

    arrival: Arrival
    record: RequestRecord
    row: int = -1
    num_computed_tokens: int = 0
    num_known: int = 0
    count: int = 0
    shared_from: tuple[int, int] | None = None

    @property
    def request_id(self) -> str:
        """Its id."""
        return self.arrival.name

    @property
    def samples(self) -> bool:
        """Whether the step that was scheduled last ends with a token whose successor is not known."""
        return self.count > 0 and self.num_computed_tokens == self.num_known


class Scheduled(NamedTuple):
    """A step.

    Attributes:
        orders: for the worker.
        batch: requests with tokens in this step.
        started: those of them that start or start over.
        finished, preempted: ids of requests that ended, or lost their cache.
    """

    orders: StepOrders
    batch: list[Running]
    started: list[Running]
    finished: list[str]
    preempted: list[str]


class Scheduler:
    """Schedules steps.

    Args:
        config: of the server.
        shape: sizes.
        traffic: how requests come.
        arrivals: the requests in order.

    Attributes:
        running: requests that hold blocks.
        controller: the scheduler's side of eviction.
        blocks: the block manager.
        num_finished, num_preempted, num_postponed: how many requests ended, how often one lost its cache, and how often
            one waited a step for its compaction.
    """

    def __init__(self, config: KVPolicyConfig, shape: Shape, traffic: Traffic, arrivals: Sequence[Arrival]) -> None:
        self._config, self._shape, self._traffic = config, shape, traffic
        records: dict[str, RequestRecord] = {}
        self.blocks = Blocks(shape.num_blocks, shape.block_size, records)
        stats = EvictionStats()
        self.controller = EvictionController(config, records, self.blocks, stats, [stats])
        self.running: list[Running] = []
        self.num_finished = self.num_preempted = self.num_postponed = 0
        self._to_come = deque(arrivals)
        self._waiting: deque[Running] = deque()
        self._free_rows = list(range(shape.max_requests))
        self._num_steps = 0

    @property
    def is_done(self) -> bool:
        """Whether all requests have ended."""
        return not (self._to_come or self._waiting or self.running)

    def step(self) -> Scheduled:
        """Schedule a step."""
        self._num_steps += 1
        self.blocks.begin_step()
        finished, preempted = self._finish(), self._preempt()
        plan = self.controller.plan(self.running, _refuse_to_preempt)
        started = self._admit(preempted)
        batch = self._count_tokens()
        self.controller.check_bounds(self.running)
        first = [request.request_id for request in started]
        orders = self.controller.orders(plan, self.running, first, ())
        self.blocks.check_integrity()
        return Scheduled(orders, batch, started, finished, preempted)

    def _finish(self) -> list[str]:
        ended = [request for request in self.running if request.num_computed_tokens >= request.arrival.end]
        for request in ended:
            self._leave(request)
            self.controller.finish(request.request_id, Text(request.arrival.prompt, []), None)
        self.num_finished += len(ended)
        return [request.request_id for request in ended]

    def _preempt(self) -> list[str]:
        every = self._traffic.preempt_every
        if not every or self._num_steps % every or not self.running:
            return []
        request = self.running[self._num_steps // every % len(self.running)]
        self._leave(request)
        self.blocks.forget(request.request_id)
        self.controller.preempted(request.request_id)
        self._waiting.appendleft(request)
        self.num_preempted += 1
        return [request.request_id]

    def _leave(self, request: Running) -> None:
        # The row of a preempted request keeps its text, so it must not be given to another one; see `_admit`.
        self.running.remove(request)
        if request.num_computed_tokens >= request.arrival.end:
            self._free_rows.append(request.row)

    def _admit(self, preempted: list[str]) -> list[Running]:
        """Start waiting requests that fit, in order."""
        while self._to_come and self._traffic.allows_arrivals(self._num_steps) and len(self._waiting) < 2:
            self._waiting.append(self._arrive(self._to_come.popleft()))
        started: list[Running] = []
        while self._waiting and self._waiting[0].request_id not in preempted:
            request = self._waiting[0]
            if self._must_wait(request):
                break
            shared, length = self._shared_with(request)
            has_row = request.row >= 0 or bool(self._free_rows)
            if not has_row or not self.blocks.fits(request.request_id, shared):
                break
            self._waiting.popleft()
            self.blocks.admit(request.request_id, shared)
            request.row = request.row if request.row >= 0 else self._free_rows.pop()
            request.num_computed_tokens, request.count = length, 0
            self.running.append(request)
            started.append(request)
        return started

    def _arrive(self, arrival: Arrival) -> Running:
        options = RequestOptions() if arrival.policy is None else RequestOptions(kv_policy=arrival.policy)
        resolved = options.resolve(self._config, len(arrival.prompt))
        demand = resolved.demand(arrival.end, self.blocks.block_size)
        self.controller.arrive(arrival.name, resolved, demand, arrival.end, arrival.prompt)
        return Running(arrival, self.controller.requests[arrival.name], num_known=len(arrival.prompt))

    def _parent_of(self, request: Running) -> Running | None:
        return next((each for each in self.running if each.request_id == request.arrival.parent), None)

    def _must_wait(self, request: Running) -> bool:
        """Whether the parent of a request is still computing the prompt of both."""
        parent = self._parent_of(request)
        return parent is not None and parent.num_computed_tokens < len(request.arrival.prompt)

    def _shared_with(self, request: Running) -> tuple[list[int], int]:
        """Return the blocks that a request can take from its parent, and how many tokens they hold."""
        request.shared_from = None
        parent = self._parent_of(request)
        if parent is None or parent.record.num_evicted:
            return [], 0
        num_prompt, size = len(request.arrival.prompt), self.blocks.block_size
        length = request.record.limit_cached((num_prompt - 1) // size * size)
        request.shared_from = (parent.row, length) if length else None
        return self.blocks.blocks(parent.request_id)[: length // size], length

    def _count_tokens(self) -> list[Running]:
        """Give every running request its tokens, those that decode first; return the requests that get some."""
        left = self._shape.max_tokens
        for request in sorted(self.running, key=lambda each: each.num_known - each.num_computed_tokens):
            if request.record.num_postponed:
                request.count = 0
                self.num_postponed += 1
                continue
            evicted, computed = request.record.num_evicted, request.num_computed_tokens
            room = request.record.planner.room(computed, evicted)
            request.count = min(request.num_known - computed, room, left)
            left -= request.count
            request.num_computed_tokens += request.count
            self.blocks.grow(request.request_id, request.num_computed_tokens - evicted)
        return [request for request in self.running if request.count]


def _refuse_to_preempt() -> str:
    raise AssertionError("the ledger promised a block that is not there")
