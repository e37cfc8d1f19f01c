"""The worker's side of eviction, shared by all model runners: it chooses which tokens stay and moves them.

The host knows all counts and never waits for the device. One `EvictionRuntime` lives in each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import KVPolicyConfig
from ..core.needs import Need
from ..core.orders import Compaction, Started, StepOrders, Swap
from ..core.reports import RecalledTokens
from ..ops.paging import PagedCache
from ..policies import make_policy
from ..trace.writer import TraceWriter
from .batch import NEVER, BatchRows, Evicted, RowTable, StepBatch
from .cache import KVCache
from .compaction import Compactor
from .lookahead import Decoder, Lookahead
from .ranks import ALONE, Ranks
from .recall import Recall
from .requests import Job, ManagedRequest, Reading, Rows
from .signals import Signals
from .signals.base import ForwardOutput, Step
from .steering import Steering


class EvictionRuntime:
    """Keeps the caches of managed requests within their budgets.

    The hooks of a step are called in this order: `begin_step`, `steer` and `prepare`, `finish_forward`.

    Args:
        config: the server's policy.
        rows: rows of the requests that can run at once.
        signals: what is collected for policies.
        device: where the model runs.
        ranks: this worker's place among those that share the model.
        trace: writes the survivors of each compaction, or None.
        steering: steers requests, or None on a server without vectors.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        rows: Rows,
        signals: Signals,
        device: torch.device,
        *,
        ranks: Ranks = ALONE,
        trace: TraceWriter | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.config = config
        self.signals = signals
        self.trace = trace
        self.steering = steering
        self.num_compactions = 0
        self.device = device
        self.ranks = ranks
        self._rows = rows
        self._requests: dict[str, ManagedRequest] = {}
        self._table = RowTable(rows.number)
        self._compactor: Compactor | None = None
        self._lookahead: Lookahead | None = None
        self._records_queries = True
        self._step: Step | None = None
        self._batch_rows: BatchRows | None = None
        """of the batch of the last step; None if a request's state has changed since"""

    def allocate(self, rows: Rows, signals: Signals) -> None:
        """Replace rows and signals by those of as many requests as the pool can hold. Call it before `bind_cache`."""
        self._rows, self.signals, self._table = rows, signals, RowTable(rows.number)

    def bind_cache(
        self,
        pages: PagedCache,
        block_size: int,
        key_scales: Tensor | None = None,
        decoder: Decoder | None = None,
        read_sink_logits: Callable[[], Tensor] | None = None,
        draft_pages: Sequence[PagedCache] = (),
        stored: Tensor | None = None,
    ) -> None:
        """Give the runtime the KV cache once it is allocated.

        Args:
            pages: KV pages of this worker's layers, in model order.
            block_size: tokens of one of vLLM's blocks; a multiple of the kernel page size.
            key_scales: float32 `[layers, H]` by which stored keys must be multiplied, or None for 1.
            decoder: computes tokens ahead, if a policy needs their queries.
            read_sink_logits: see `KVCache`.
            draft_pages: pages of each layer of a drafter, in the same blocks.
            stored: pages for evicted tokens, see `Recall`; None if none comes back.
        """
        num_heads = 0 if self.signals.queries is None else self.signals.queries.num_heads
        cache = KVCache(pages, block_size, key_scales, read_sink_logits, num_heads, self.ranks.most_pairs)
        for signal in self.signals:
            signal.bind_cache(cache)
        recall = None
        if stored is not None:
            threshold = self.config.kv_recall_threshold
            recall = Recall(cache, stored, self.signals, self.ranks, self._rows.number, threshold)
        self._compactor = Compactor(self.config, cache, self.signals, self.ranks, draft_pages, recall)
        self._lookahead = None if decoder is None else Lookahead(decoder, self._compactor)

    @property
    def num_rows(self) -> int:
        """Requests that can run at once."""
        return self._rows.number

    @property
    def recalled(self) -> RecalledTokens | None:
        """How many evicted tokens came back, some steps ago; None if none can or that is not known yet."""
        recall = None if self._compactor is None else self._compactor.recall
        return None if recall is None else recall.counts()

    @property
    def num_stored_pages(self) -> int:
        """Pages of host memory for evicted tokens."""
        recall = None if self._compactor is None else self._compactor.recall
        return 0 if recall is None else recall.num_pages

    def reset_counts(self) -> None:
        """Forget what was counted so far."""
        self.num_compactions = 0
        if self._compactor is not None and self._compactor.recall is not None:
            self._compactor.recall.reset_counts()

    @property
    def cache(self) -> KVCache:
        """The KV cache, once it is bound."""
        assert self._compactor is not None
        return self._compactor.cache

    # ---- before the forward pass

    def begin_step(self, orders: StepOrders | None, finished: Iterable[str], preempted: Iterable[str]) -> None:
        """Carry out the orders of a step. Call it before anything else of the step touches the cache.

        Args:
            orders: orders of the scheduler; None in a step without any.
            finished: requests that ended.
            preempted: requests that lost their cache and may start over.
        """
        for request_id in (*finished, *preempted):
            self._forget(request_id)
        if self.trace is not None:
            self.trace.finished(finished)
        self._records_queries = orders is not None and orders.records_queries
        if orders is None:
            return
        if self.steering is not None:
            for steered in orders.steered:
                self.steering.start(steered)
        if orders.started:
            self._batch_rows = None
        if orders.accumulations:
            readings = [Reading(order, self._requests[order.request_id]) for order in orders.accumulations]
            for signal in self.signals:
                signal.accumulate(readings)
        if orders.compactions:
            self._compact(orders.compactions)
            if self._batch_rows is not None:
                self._batch_rows.update_evicted()
        if orders.swaps:
            self._swap(orders.swaps)
        for started in orders.started:
            self._start(started)

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            for signal in self.signals:
                signal.forget(request.row)
        if self.steering is not None:
            self.steering.forget(request_id)
        self._rows.release(request_id)

    def _start(self, order: Started) -> None:
        config, table = self.config, self._table
        policy = config.policy if order.policy == config.kv_policy else make_policy(order.policy)
        if order.num_question:
            policy = policy.with_question(order.num_question)
        row, needs = self._rows.take(order.request_id), config.needs_of(policy)
        request = ManagedRequest(row, policy, needs, order.num_prompt, order.protected)
        self._requests[order.request_id] = request
        table.num_evicted[row] = 0
        table.is_recorded[row] = bool(needs & Need.QUERIES)
        table.first_tracked[row] = order.first_tracked if needs & Need.SENTENCES else NEVER
        for signal in self.signals:
            signal.forget(row)
            signal.start(request, order)
        if self.trace is not None:
            self.trace.started(order.request_id)

    def prepare(self, batch: StepBatch) -> Evicted | None:
        """Get ready for the forward pass over a batch.

        Returns:
            Tokens that each request has evicted, to be subtracted from its sequence length and slot positions (never
            from its RoPE positions); None if no request has evicted any.
        """
        rows = self._rows_of(batch.request_ids)
        self._step = step = Step(batch, rows, self._records_queries)
        for prepare in self.signals.prepare:
            prepare(step)
        return rows.evicted

    def evicted(self, request_ids: Sequence[str]) -> Evicted | None:
        """Return what `prepare` will, for a runner that needs it before the device has the positions of drafts."""
        return self._rows_of(request_ids).evicted

    def steer(self, batch: StepBatch, token_ids: Tensor) -> None:
        """Compute how strongly each token of the coming forward pass is steered.

        Args:
            batch: its requests.
            token_ids: integer `[>= T]` on the device.
        """
        if self.steering is not None:
            self.steering.prepare(batch, token_ids if batch.positions is None else _known(token_ids, batch.num_tokens))

    def prepare_dummy(self) -> None:
        """Get ready for a forward pass without requests: profiling, graph capture, idle data-parallel rank."""
        self._step = None
        if self.steering is not None:
            self.steering.prepare_dummy()
        for signal in self.signals:
            signal.prepare_dummy()

    def num_evicted(self, request_id: str) -> int:
        """Return how many tokens of this request are no longer held."""
        request = self._requests.get(request_id)
        return 0 if request is None else int(self._table.num_evicted[request.row])

    def _rows_of(self, request_ids: Sequence[str]) -> BatchRows:
        known = self._batch_rows
        if known is not None and known.request_ids == request_ids:
            return known
        found = (self._requests.get(request_id) for request_id in request_ids)
        unmanaged = self._table.unmanaged
        rows = np.fromiter((unmanaged if r is None else r.row for r in found), np.int64, len(request_ids))
        self._batch_rows = BatchRows(list(request_ids), rows, self._table, self.device)
        return self._batch_rows

    # ---- after the forward pass

    def finish_forward(self, output: ForwardOutput) -> None:
        """Read what the forward pass produced. With speculative decoding call it when drafts have been accepted."""
        step, self._step = self._step, None
        if step is None:
            return
        if output.num_rejected is not None:
            output = output._replace(token_ids=_known(output.token_ids, step.batch.num_tokens))
        if self._lookahead is not None:
            self._lookahead.after_forward(step, output, self._requests)
        if self.steering is not None and output.num_rejected is not None:
            self.steering.accept(step.batch, output.token_ids, output.num_rejected)
        for after_forward in self.signals.after_forward:
            after_forward(step, output)

    # ---- compaction

    def _compact(self, orders: Sequence[Compaction]) -> None:
        """Choose the survivors of each request and move them to the front of its blocks."""
        assert self._compactor is not None
        jobs = [Job(order, self._requests[order.request_id]) for order in orders]
        for order, request in jobs:
            num_evicted = self._table.num_evicted[request.row]
            if (num_evicted, request.num_compactions) != (order.num_evicted_before, order.ordinal):
                raise RuntimeError(
                    f"scheduler and worker disagree about {order.request_id}: the scheduler counts "
                    f"{order.num_evicted_before} evicted tokens in {order.ordinal} compactions, this worker "
                    f"{num_evicted} in {request.num_compactions}"
                )
        if any(order.lookahead_blocks for order in orders):
            assert self._lookahead is not None
            jobs = self._lookahead.run(jobs)
        self._compactor.run(jobs)
        for order, request in jobs:
            self._finish(order, request)

    def _finish(self, order: Compaction, request: ManagedRequest) -> None:
        """Update the state of a request after its compaction."""
        request.lookahead_queries, request.first_draft, request.num_question = None, None, 0
        request.num_placed = order.num_keep
        request.num_compactions += 1
        self._table.num_evicted[request.row] = order.num_logical - order.num_keep
        self.num_compactions += 1
        if self.trace is not None:
            sentences = self.signals.sentences
            similar = None if sentences is None else sentences.similar_pairs(request.row)
            self.trace.compacted(order, self.held(order).sort(dim=-1).values, similar)
        if self.config.kv_check_integrity:
            self.check_integrity(order)

    def _swap(self, orders: Sequence[Swap]) -> None:
        assert self._compactor is not None
        assert self._compactor.recall is not None
        self._compactor.recall.swap([(order, self._requests[order.request_id]) for order in orders])
        if self.trace is not None:
            for order in orders:
                self.trace.swapped(order, self.held(order).sort(dim=-1).values)

    def held(self, order: Compaction | Swap) -> Tensor:
        """Return the positions held after a compaction or swap, int32 `[layers, H, held]` by slot."""
        num_held, blocks = order.after
        num_placed = self._requests[order.request_id].num_placed
        return self.cache.positions_of(blocks, num_held, num_placed, order.num_logical - num_held)

    # ---- checks

    def check_integrity(self, order: Compaction) -> None:
        """Verify a request's state right after its compaction. Synchronises; for tests and bug reports.

        Raises:
            AssertionError: a token is held twice, is out of range, or is missing although it must survive.
        """
        request, window, held = self._requests[order.request_id], self.config.kv_window, self.held(order)
        ordered = held.sort(dim=-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all(), "a token is held twice"
        assert (ordered[..., 0] >= 0).all(), "a position is negative"
        assert (ordered[..., -1] < order.num_logical).all(), "a position lies in the future"
        expected = torch.arange(order.num_logical - window, order.num_logical, device=held.device)
        assert (ordered[..., -window:] == expected).all(), "a token of the window was evicted"
        assert ((held < request.protected).sum(-1) == request.protected).all(), "a protected prompt token was evicted"
        first = max(0, request.num_prompt - request.policy.num_question(window))
        for position in range(first, min(request.num_prompt, order.num_logical)):
            assert (held == position).any(-1).all(), "a token of the question was evicted"
        assert order.num_logical - self.num_evicted(order.request_id) == order.num_keep
        self._rows.check_integrity()


def _known(token_ids: Tensor, num_tokens: int) -> Tensor:
    """Return the ids of a step's tokens, with 0 for placeholders of drafts, as the model reads them."""
    return token_ids[:num_tokens].clamp(min=0)
