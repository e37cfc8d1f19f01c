"""The controller of a step: asks the planner of each request, has blocks freed and makes the workers' orders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from ..config import KVPolicyConfig, ResolvedRequest
from ..core.limits import Demand, ceil_div
from ..core.needs import FROM_RECENT_QUERIES
from ..core.orders import Accumulation, Compaction, Started, SteeredRequest, StepOrders, Swap
from .listeners import client_report
from .planner import PlannedCompaction
from .requests import RequestListener, RequestRecord, Text
from .stats import EvictionStats
from .store import TokenStore


class RunningRequest(Protocol):
    """The part of vLLM's `Request` that planning reads."""

    request_id: str
    num_computed_tokens: int
    """tokens in flight included"""


class CompactedBlocks(NamedTuple):
    """Block ids of a request before and after a compaction."""

    source_blocks: list[int]
    target_blocks: list[int]


class BlockManager(Protocol):
    """The part of the block manager that the controller uses."""

    block_size: int

    @property
    def num_promised(self) -> int:
        """Blocks promised to running requests."""

    def blocks(self, request_id: str) -> list[int]:
        """Return the block ids of a request."""

    def compact(self, request_id: str, plan: PlannedCompaction) -> CompactedBlocks | None:
        """Shorten a request's table and free the rest; None, and nothing changes, if too few blocks are free."""

    def take_lookahead(self, num_tokens: int) -> list[int] | None:
        """Take free blocks for that many tokens until `return_lookahead`; None if too few are free."""

    def return_lookahead(self) -> None:
        """Free all lookahead blocks."""

    def forget(self, request_id: str) -> None:
        """End all promises to a request that ended."""


class StepPlan(NamedTuple):
    """The compactions, accumulations and swaps of a step, before vLLM schedules it."""

    compactions: list[Compaction]
    accumulations: list[Accumulation]
    swaps: list[Swap]


class _Due(NamedTuple):
    request: RequestRecord
    num_logical: int
    plan: PlannedCompaction


class EvictionController:
    """Decides in each step which requests are compacted, and calls the listeners.

    Call `arrive` for each request. In each step call `plan` before vLLM schedules the step and `orders` after it. Call
    `preempted` and `finish` when vLLM has freed the blocks of a request.

    Attributes:
        requests: the records by request id. Only this class adds and removes them; the block manager reads them.
        stats: counts for the metrics.
        listeners: called in this order.
        store: room for evicted tokens in host memory; None if none comes back.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        requests: dict[str, RequestRecord],
        blocks: BlockManager,
        stats: EvictionStats,
        listeners: Sequence[RequestListener],
        *,
        num_draft_slots: int = 0,
        store: TokenStore | None = None,
    ) -> None:
        self.store = store
        self.requests = requests
        self.stats = stats
        self._blocks = blocks
        self.listeners = listeners
        self._num_queries = config.num_queries
        self._accumulates = bool(config.needs & FROM_RECENT_QUERIES)
        self._traces = config.kv_trace_dir is not None
        self._most_compactions, self._buffer = config.kv_compactions_per_step, config.kv_buffer
        self._num_draft_slots = num_draft_slots

    # ---- the life of a request

    def arrive(
        self, request_id: str, resolved: ResolvedRequest, demand: Demand, end: int, prompt: Sequence[int]
    ) -> None:
        """Add a request.

        Args:
            request_id: its id.
            resolved: the settings that apply to it.
            demand: the most it may need.
            end: logical length beyond which it computes no token.
            prompt: token ids; empty if the prompt is given as embeddings.
        """
        request = RequestRecord.make(
            request_id,
            resolved,
            demand,
            end=end,
            num_queries=self._num_queries,
            block_size=self._blocks.block_size,
            is_traced=self._traces,
        )
        self.requests[request_id] = request
        for listener in self.listeners:
            listener.arrived(request, prompt)

    def preempted(self, request_id: str) -> None:
        """Note that a request lost its blocks; it starts over when it resumes."""
        request = self.requests[request_id]
        request.planner.restart()
        request.num_postponed = 0
        if self.store is not None:
            self.store.forget(request_id)

    def finish(self, request_id: str, text: Text, params: dict[str, Any] | None) -> dict[str, Any] | None:
        """Remove a request that ended; return its `kv_transfer_params` with our report for the client."""
        self._blocks.forget(request_id)
        if self.store is not None:
            self.store.forget(request_id)
        request = self.requests.pop(request_id)
        for listener in self.listeners:
            listener.finished(request, text)
        return client_report(params, request)

    # ---- one step

    def plan(self, running: Collection[RunningRequest], preempt: Callable[[], str]) -> StepPlan:
        """Plan the compactions, accumulations and swaps of the coming step.

        The blocks that the compactions empty are free afterwards, so this very step can use them. A request whose
        compaction is postponed must get no tokens in the step.

        Args:
            running: the running requests.
            preempt: preempts a running request to free its blocks and returns its id.
        """
        requests, accumulates = self.requests, self._accumulates
        candidates = [
            (requests[running_request.request_id], running_request.num_computed_tokens)
            for running_request in running
            if accumulates
            or running_request.num_computed_tokens >= requests[running_request.request_id].planner.earliest
        ]
        if not candidates:
            return StepPlan([], [], [])
        due = [
            _Due(request, num_logical, plan)
            for request, num_logical in candidates
            if (plan := request.planner.due(num_logical, request.num_evicted)) is not None
        ]
        waiting = {each.request.request_id for each in due}
        swapping = [
            (request, num_logical)
            for request, num_logical in candidates
            if self.store is not None and request.request_id not in waiting and request.planner.swaps(num_logical)
        ]
        due = self._postpone(due, len(running))
        moving = {each.request.request_id for each in due} | {request.request_id for request, _ in swapping}
        # Accumulations read the blocks as they are before the compactions.
        accumulations = self._accumulate(candidates, moving)
        compactions = self._compact(due, preempt)
        if self.store is None:
            return StepPlan(compactions, accumulations, [])
        # Now all requests of the step have got their room in the store.
        stored = [self.store.stored(order.request_id, copies=True) for order in compactions]
        compactions = [order._replace(stored=each) for order, each in zip(compactions, stored, strict=True)]
        return StepPlan(compactions, accumulations, self._swap(swapping))

    def _swap(self, swapping: list[tuple[RequestRecord, int]]) -> list[Swap]:
        assert self.store is not None
        swaps = []
        for request, num_logical in swapping:
            request_id = request.request_id
            stored = self.store.stored(request_id, copies=False)
            if stored is not None:
                num_resident, blocks = num_logical - request.num_evicted, self._blocks.blocks(request_id)
                swaps.append(Swap(request_id, num_logical, num_resident, blocks, stored))
        return swaps

    def _store(self, request: RequestRecord, num_logical: int) -> None:
        """Make room for what a compaction copies to the store."""
        limits = request.resolved.limits
        if self.store is None or limits is None:
            return
        num_dropped = self.store.num_dropped
        self.store.compact(request.request_id, limits, num_logical)
        if self.store.num_dropped > num_dropped:
            self.stats.dropped_stored(self.store.num_dropped - num_dropped)

    def _postpone(self, due: list[_Due], num_running: int) -> list[_Due]:
        """Return the compactions of this step: of too many, those that have waited longest.

        Requests that started together come due together. One that waits a step is out of time with the others from
        then on.
        """
        # On average `num_running / buffer` requests come due in a step.
        most = max(self._most_compactions, ceil_div(2 * num_running, self._buffer))
        if len(due) > most:
            due.sort(key=lambda each: each.request.num_postponed, reverse=True)
            for each in due[most:]:
                each.request.num_postponed += 1
            self.stats.postponed(len(due) - most)
            due = due[:most]
        for each in due:
            each.request.num_postponed = 0
        return due

    def _accumulate(self, candidates: list[tuple[RequestRecord, int]], moving: set[str]) -> list[Accumulation]:
        if not self._accumulates:
            return []
        accumulations = []
        for request, num_logical in candidates:
            request_id = request.request_id
            num_queries = request.planner.accumulate(num_logical, request_id in moving)
            if num_queries:
                num_resident, blocks = num_logical - request.num_evicted, self._blocks.blocks(request_id)
                accumulations.append(Accumulation(request_id, num_logical, num_resident, num_queries, blocks))
        return accumulations

    def _compact(self, due: list[_Due], preempt: Callable[[], str]) -> list[Compaction]:
        # Lookahead blocks are taken before any block is freed, so none of them is still to be read.
        lookahead = self._take_lookahead(due)
        compactions = []
        preempted: set[str] = set()
        for request, num_logical, plan in due:
            blocks = self._compact_blocks(request.request_id, plan, preempt, preempted)
            if blocks is None:
                continue
            compactions.append(
                Compaction(
                    request_id=request.request_id,
                    num_logical=num_logical,
                    num_resident=plan.num_resident,
                    num_keep=plan.num_keep,
                    source_blocks=blocks.source_blocks,
                    target_blocks=blocks.target_blocks,
                    ordinal=request.planner.num_compactions,
                    lookahead_blocks=lookahead.get(request.request_id, []),
                )
            )
            self._store(request, num_logical)
            request.planner.committed(num_logical)
        if lookahead:
            self._blocks.return_lookahead()
        return compactions

    def _take_lookahead(self, due: list[_Due]) -> dict[str, list[int]]:
        """Take the lookahead blocks of a step; return them by request.

        Bounded admission promises them. Optimistic admission does not, so they may be missing. Then the request is
        compacted without the queries of the lookahead, which is counted.
        """
        blocks = {}
        for request, _, plan in due:
            if not plan.num_lookahead:
                continue
            found = self._blocks.take_lookahead(plan.num_lookahead)
            if found is None:
                self.stats.skipped("no_pages_for_probe")
            else:
                blocks[request.request_id] = found
        return blocks

    def _compact_blocks(
        self, request_id: str, plan: PlannedCompaction, preempt: Callable[[], str], preempted: set[str]
    ) -> CompactedBlocks | None:
        """Free a request's blocks; return None if the request itself was preempted.

        With optimistic admission a shared block may have to be replaced while no block is free. Then requests are
        preempted, because a compaction that waited would evict other tokens.
        """
        while request_id not in preempted:
            blocks = self._blocks.compact(request_id, plan)
            if blocks is not None:
                return blocks
            preempted.add(preempt())
        return None

    def orders(
        self,
        plan: StepPlan,
        running: Iterable[RunningRequest],
        first_scheduled: Iterable[str],
        preempted: Collection[str],
    ) -> StepOrders:
        """Return the orders of a step that was scheduled, and tell the listeners.

        Args:
            plan: of this step.
            running: the running requests; their counts include the tokens of this step.
            first_scheduled: requests whose first tokens this step computes.
            preempted: requests that lost their blocks in this step, so that their orders must not be carried out.
        """
        compactions, accumulations, swaps = plan
        if preempted:
            compactions = [order for order in compactions if order.request_id not in preempted]
            accumulations = [order for order in accumulations if order.request_id not in preempted]
            swaps = [order for order in swaps if order.request_id not in preempted]
        requests = self.requests
        for order in compactions:
            for listener in self.listeners:
                listener.compacted(requests[order.request_id], order)
        for swap in swaps:
            for listener in self.listeners:
                listener.swapped(requests[swap.request_id], swap)
        started, steered = self._start(first_scheduled)
        records_queries = self._accumulates or any(
            request.num_computed_tokens > requests[request.request_id].planner.queries_from for request in running
        )
        return StepOrders(compactions, started, accumulations, records_queries, steered, swaps)

    def _start(self, request_ids: Iterable[str]) -> tuple[list[Started], list[SteeredRequest]]:
        started, steered = [], []
        for request_id in request_ids:
            request = self.requests[request_id]
            resolved = request.resolved
            if resolved.limits is not None:
                protected = resolved.limits.protected
                order = Started(
                    request_id, resolved.policy.name, resolved.num_prompt, protected, protected, resolved.num_question
                )
                for listener in self.listeners:
                    listener.started(request, order)
                request.recomputes_sentences = False
                if request.is_managed:
                    started.append(order)
            if request.steering is not None:
                steered.append(request.steering)
        return started, steered

    # ---- reports and checks

    def report(self, running: Iterable[RunningRequest]) -> dict[str, float]:
        """Return the counts since the last report, with the current gauges."""
        for listener in self.listeners:
            listener.before_report()
        num_logical = num_evicted = 0
        for request in running:
            num_logical += request.num_computed_tokens
            num_evicted += self.requests[request.request_id].num_evicted
        num_stored = 0 if self.store is None else self.store.num_tokens
        return self.stats.take(num_logical, num_logical - num_evicted, self._blocks.num_promised, num_stored)

    def idle(self) -> None:
        """Tell the listeners that no request is left."""
        for listener in self.listeners:
            listener.idle()

    def close(self) -> None:
        """Tell the listeners that the scheduler shuts down."""
        for listener in self.listeners:
            listener.close()

    def check_bounds(self, running: Iterable[RunningRequest]) -> None:
        """Verify that every running request stays within its bound, also while its text is computed.

        Raises:
            AssertionError: a request holds more tokens or blocks than its bound allows.
        """
        for running_request in running:
            request_id = running_request.request_id
            request = self.requests[request_id]
            bound = request.planner.bound
            if bound is None:
                continue
            resident = running_request.num_computed_tokens - request.num_evicted
            if request.planner.is_done:
                bound += self._num_draft_slots  # placeholders of drafts that vLLM adds to a request's last token
            assert resident <= bound, f"{request_id} holds {resident} of at most {bound} tokens"
            num_blocks = len(self._blocks.blocks(request_id))
            most = ceil_div(bound + self._num_draft_slots, self._blocks.block_size)
            assert num_blocks <= most, f"{request_id} holds {num_blocks} of at most {most} blocks"
