"""The worker side of eviction, the same for every model runner: which tokens stay, and moving them.

The host knows all counts and never waits for the device. One `EvictionRuntime` lives in each worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import KVPolicyConfig, needs_of
from ..core.device import to_device
from ..core.needs import ACCUMULATED, Need
from ..core.orders import Accumulation, Compaction, Started, StepOrders
from ..ops.paging import PagedCache
from ..policies import LookaheadPlan, Policy, make_policy
from ..trace.writer import TraceWriter
from .batch import NEVER, BatchRows, Evicted, StepBatch
from .compaction import Compactor, Job, Managed
from .ranks import ALONE, Ranks
from .signals.attention_mass import AttentionSums
from .signals.gates import TokenGates
from .signals.queries import QueryRing
from .signals.segments import SegmentTable
from .signals.sentences import SentenceTracker, TrackedTokens
from .steering import Steering

if TYPE_CHECKING:
    from ..integration.forward import Prober


class EvictionRuntime:
    """Keeps the caches of managed requests within their budgets.

    Args:
        config: the server's policy.
        num_slots: requests that can run at once.
        ring: observation queries, or None where no policy reads them.
        tracker: sentences, or None where no policy reads them.
        gates: learned gates, or None where no policy reads them.
        trace: writes what was kept, or None.
        device: where the model runs.
        ranks: this worker's place among those that share the model.
        steering: steers requests, or None on a server without vectors.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        num_slots: int,
        ring: QueryRing | None,
        tracker: SentenceTracker | None,
        gates: TokenGates | None,
        trace: TraceWriter | None,
        device: torch.device,
        ranks: Ranks = ALONE,
        steering: Steering | None = None,
    ) -> None:
        self.config = config
        self.ring = ring
        self.tracker = tracker
        self.gates = gates
        self.trace = trace
        self._device = device
        self._ranks = ranks
        self.steering = steering
        self._requests: dict[str, Managed] = {}
        self._free_slots = list(reversed(range(num_slots)))
        # By slot; the last entry is for unmanaged requests.
        self._nobody = num_slots
        self._evicted = np.zeros(num_slots + 1, dtype=np.int32)
        self._observed = np.zeros(num_slots + 1, dtype=bool)
        self._first_tracked = np.full(num_slots + 1, NEVER, dtype=np.int64)
        self._sums = AttentionSums()
        self._segments = SegmentTable()
        self.prober: Prober | None = None
        """computes tokens ahead, where a policy needs their queries"""
        self._compactor: Compactor | None = None
        self._records_queries = True
        self._batch: StepBatch | None = None
        self._rows: BatchRows | None = None
        """of the batch of the last step; None where a request's state has changed since"""
        self.num_compactions = 0

    def bind_cache(self, cache: PagedCache, block_size: int, key_scales: Tensor | None = None) -> None:
        """Give the runtime the KV pages, once they are allocated.

        Args:
            cache: layers in model order.
            block_size: tokens of one of vLLM's blocks; a multiple of the kernels' page size.
            key_scales: float32 `[layers, H]` by which stored keys must be multiplied, or None for 1.
        """
        if self.gates is not None:
            self.gates.bind_cache(cache)
        collected = (self.ring, self.tracker, self.gates, self._sums, self._segments)
        self._compactor = Compactor(self.config, cache, block_size, *collected, self._ranks, key_scales)

    # ---- before the forward pass

    def begin_step(self, orders: StepOrders | None, finished: Iterable[str], preempted: Iterable[str]) -> None:
        """Carry out the orders of a step. Call it before anything else of the step touches the cache.

        Args:
            orders: from the scheduler; None in a step that carries none.
            finished: requests that ended.
            preempted: requests that lost their cache and may start over.
        """
        if self.steering is not None:
            self.steering.begin(orders.steered if orders else (), (*finished, *preempted))
        for request_id in (*finished, *preempted):
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._free_slots.append(request.slot)
                self._forget(request.slot)
        if self.trace is not None:
            self.trace.finished(finished)
        self._records_queries = orders is not None and orders.records_queries
        if orders is None:
            return
        if orders.started:
            self._rows = None
        if orders.accumulations:
            self._observe([(order, self._requests[order.request_id]) for order in orders.accumulations])
        if orders.compactions:
            self._compact(orders.compactions)
            if self._rows is not None:
                self._rows.set_evicted(self._evicted[self._rows.slots])
        for started in orders.started:
            self._start(started)

    def _start(self, started: Started) -> None:
        policy = self.config.policy if started.policy == self.config.kv_policy else make_policy(started.policy)
        if started.num_question:
            policy = policy.with_question(started.num_question)
        old = self._requests.pop(started.request_id, None)
        slot = self._free_slots.pop() if old is None else old.slot
        self._requests[started.request_id] = Managed(
            slot=slot,
            policy=policy,
            needs=needs_of(policy, self.config.kv_granularity),
            protected=started.protected,
            num_prompt=started.num_prompt,
        )
        needs = self._requests[started.request_id].needs
        self._forget(slot)
        self._evicted[slot] = 0
        self._observed[slot] = bool(needs & Need.QUERIES)
        self._first_tracked[slot] = started.first_tracked if needs & Need.SENTENCES else NEVER
        if self.tracker is not None:
            self.tracker.reset(slot, started.first_tracked)
        if self.trace is not None:
            self.trace.started(started.request_id)

    def _forget(self, slot: int) -> None:
        self._sums.forget(slot)
        self._segments.forget(slot)

    def prepare(self, batch: StepBatch) -> Evicted | None:
        """Get ready for the forward pass over a batch.

        Returns:
            Tokens each request has evicted, to be taken off its sequence length and slot positions (never off
            its RoPE positions); None where nobody has evicted any.
        """
        self._batch = batch
        rows = self._rows
        if rows is None or rows.request_ids != batch.request_ids:
            rows = self._rows = self._rows_of(batch.request_ids)
        if self.ring is not None:
            if self._records_queries:
                self.ring.prepare(rows.observed_slots, batch.counts, batch.starts, batch.num_tokens)
            else:
                self.ring.skip()
        if self.gates is not None:
            self.gates.prepare(batch.num_tokens)
        return rows.evicted

    def steer(self, batch: StepBatch, token_ids: Tensor) -> None:
        """Say how strongly each token of the coming forward pass is steered.

        Args:
            batch: its requests.
            token_ids: integer `[>= T]` on the device.
        """
        if self.steering is not None:
            self.steering.prepare(batch, token_ids)

    def prepare_dummy(self) -> None:
        """Get ready for a forward pass without requests: profiling, graph capture, idle data-parallel rank."""
        self._batch = None
        if self.steering is not None:
            self.steering.prepare_dummy()
        if self.ring is not None:
            self.ring.idle()
        if self.gates is not None:
            self.gates.prepare(0)

    def num_evicted(self, request_id: str) -> int:
        """Tokens of this request that are no longer held."""
        request = self._requests.get(request_id)
        return 0 if request is None else request.num_evicted

    def _rows_of(self, request_ids: Sequence[str]) -> BatchRows:
        found = (self._requests.get(request_id) for request_id in request_ids)
        slots = np.fromiter((self._nobody if r is None else r.slot for r in found), np.int64, len(request_ids))
        return BatchRows(
            list(request_ids),
            slots,
            self._evicted[slots],
            self._observed[slots],
            self._first_tracked[slots],
            self._device,
        )

    # ---- after the forward pass

    def finish_forward(self, token_ids: Tensor, hidden: Tensor, logits: Tensor | None = None) -> None:
        """Read what the forward pass produced: sentences, and what follows prompts that are complete now.

        Args:
            token_ids: `[>= T]` the step's input ids on the device.
            hidden: `[>= T, E]` last hidden states, after the final norm.
            logits: `[R, V]` of each request's last token, where tokens are computed ahead.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return
        if self.prober is not None:
            assert logits is not None
            ends = (batch.starts + batch.counts).tolist()
            for row, request_id in enumerate(batch.request_ids):
                request = self._requests.get(request_id)
                if (
                    request is not None
                    and request.policy.lookahead_plan is not None
                    and ends[row] == request.num_prompt
                ):
                    request.first_draft = logits[row].argmax()
        if self.tracker is None:
            return
        assert self._rows is not None
        spans, num_tokens = self._rows.tracked.of(batch)
        if num_tokens:
            self.tracker.update(TrackedTokens(token_ids, spans, num_tokens, hidden))

    # ---- attention

    def _observe(self, orders: Sequence[tuple[Accumulation, Managed]]) -> None:
        """Look at the attention of the newest queries, as far as each request's method asks for it."""
        assert self._compactor is not None
        if adding := [each for each in orders if each[1].needs & ACCUMULATED]:
            self._compactor.accumulate(adding)
        for order, request in orders:
            if request.needs & Need.SEGMENTS:
                self._note_segment(request, order)

    def _seen(self, request: Managed, order: Accumulation) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """By layer: the newest queries, the keys they saw and the positions of these, for `ops.attention_...`."""
        assert self._compactor is not None
        assert self.ring is not None
        positions, pages = self._positions(request, order.blocks, order.num_resident)
        for i in range(len(self._compactor.layers)):
            queries = self.ring.read(i, request.slot, order.num_logical, order.num_queries)
            yield i, (queries, self._compactor.keys(i, pages, order.num_resident), positions[i])

    def _note_segment(self, request: Managed, order: Accumulation) -> None:
        """A segment of the request's text is written: note how sparse the attention of its newest queries is."""
        options = request.policy.segment_options
        # Of every layer and head its sparsity and whether it counts, both averaged over ranks: so all note the same.
        found = []
        for i, each in self._seen(request, order):
            sparsity = ops.attention_sparsity(*each, negligible=options.negligible)
            counts = not options.layers or self._ranks.first_layer + i in options.layers
            found.append(torch.stack([sparsity, torch.ones_like(sparsity)], dim=-1) * counts)
        mean = self._ranks.mean(torch.stack(found)[None])[0]
        number = (order.num_logical - request.protected) // options.length - 1
        self._segments.note(request.slot, number, mean[0] / mean[1])

    def _positions(self, request: Managed, pages: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Positions `[layers, H, length]` by slot, and the kernel pages, int64, of one request."""
        assert self._compactor is not None
        table = self._compactor.table([pages])
        placed = to_device([[request.num_placed], [request.num_evicted]], torch.int32, table.device)
        return self._compactor.positions.read(table, length, *placed)[0], table[0].long()

    # ---- compaction

    def _compact(self, orders: Sequence[Compaction]) -> None:
        """Choose the survivors of each request and move them to the front of its pages."""
        assert self._compactor is not None
        jobs = [Job(order, self._requests[order.request_id]) for order in orders]
        for order, request in jobs:
            if (request.num_evicted, request.num_compactions) != (order.num_evicted_before, order.ordinal):
                raise RuntimeError(
                    f"scheduler and worker disagree about {order.request_id}: evicted {order.num_evicted_before} "
                    f"tokens in {order.ordinal} compactions by the scheduler, {request.num_evicted} in "
                    f"{request.num_compactions} here"
                )
        if any(order.lookahead_blocks for order in orders):
            jobs = self._probe(jobs)
        self._compactor.run(jobs)
        for order, request in jobs:
            request.lookahead_queries, request.first_draft, request.num_question = None, None, 0
            request.num_evicted += order.num_resident - order.num_keep
            self._evicted[request.slot] = request.num_evicted
            request.num_placed = order.num_keep
            request.num_compactions += 1
            self.num_compactions += 1
            if self.trace is not None:
                held, _ = self._positions(request, order.target_blocks, order.num_keep)
                similar = None
                if self.tracker is not None and self.tracker.compares:
                    similar = self.tracker.similar_pairs(request.slot)
                self.trace.compacted(order, held.sort(dim=-1).values, similar)
            if self.config.kv_check_integrity:
                self.check_integrity(order)

    def _probe(self, jobs: Sequence[Job]) -> list[Job]:
        """Compute tokens ahead for those that have pages for it; the jobs with what that changes of their orders."""
        assert self.prober is not None
        groups: dict[tuple[LookaheadPlan, int], list[Job]] = {}
        for job in jobs:
            lookahead, window = job.request.policy.lookahead_plan, self.config.kv_window
            if job.order.lookahead_blocks and lookahead is not None:
                num_tokens = (
                    job.request.policy.num_question(window) if lookahead.draft is None else lookahead.num_tokens
                )
                # Each request for itself: what is computed for it must not depend on the others.
                num_tokens = min(num_tokens, self.prober.max_length - job.order.num_logical)
                groups.setdefault((lookahead, num_tokens), []).append(job)
        asked: dict[str, Job] = {}
        for (lookahead, num_tokens), group in groups.items():
            if lookahead.draft is not None:
                self._decode_ahead(group, lookahead.draft, num_tokens)
                continue
            most = max(1, self.prober.max_tokens // num_tokens)
            for i in range(0, len(group), most):
                asked |= {job.order.request_id: job for job in self._ask(group[i : i + most], num_tokens)}
        return [asked.get(job.order.request_id, job) for job in jobs]

    def _ask(self, jobs: Sequence[Job], num_tokens: int) -> list[Job]:
        """Append the question to each cache, in pages that the compaction then reads as well."""
        assert self.prober is not None
        asked = [
            Job(order._replace(source_blocks=order.source_blocks + order.lookahead_blocks), request)
            for order, request in jobs
        ]
        questions = [self.prober.question(order.request_id, num_tokens) for order, _ in jobs]
        tokens = to_device(questions, torch.int64, self._device)
        self._compute_ahead(asked, tokens, [o.num_resident for o, _ in jobs], [o.source_blocks for o, _ in asked])
        for _, request in jobs:
            request.num_question = num_tokens
        return asked

    def _decode_ahead(self, jobs: Sequence[Job], draft: Policy, num_tokens: int) -> None:
        """Decode what follows each prompt on a temporary copy of its cache."""
        assert self._compactor is not None
        assert self.prober is not None
        needs = needs_of(draft, self.config.kv_granularity)
        copies = [
            Job(
                order._replace(target_blocks=order.lookahead_blocks[: len(order.target_blocks)]),
                replace(request, policy=draft, needs=needs),
            )
            for order, request in jobs
        ]
        self._compactor.run(copies)
        firsts = [request.first_draft for _, request in jobs if request.first_draft is not None]
        held, pages = [order.num_keep for order, _ in jobs], [order.lookahead_blocks for order, _ in jobs]
        self._compute_ahead(jobs, torch.stack(firsts)[:, None], held, pages, num_tokens)

    def _compute_ahead(
        self,
        jobs: Sequence[Job],
        tokens: Tensor,
        num_held: Sequence[int],
        pages: Sequence[Sequence[int]],
        num_tokens: int = 0,
    ) -> None:
        """See `Prober.decode`."""
        assert self._compactor is not None
        assert self.prober is not None
        queries = self.prober.decode(
            tokens,
            [order.num_logical for order, _ in jobs],
            num_held,
            self._compactor.table(pages),
            self._compactor.layers[0].page_size,
            num_tokens,
        )
        for (_, request), each in zip(jobs, queries, strict=True):
            request.lookahead_queries = each

    # ---- checks

    def check_integrity(self, order: Compaction) -> None:
        """Verify a request's state right after its compaction. Synchronises; for tests and bug reports.

        Raises:
            AssertionError: a token is held twice, out of range or missing although it must survive.
        """
        request = self._requests[order.request_id]
        held, _ = self._positions(request, order.target_blocks, order.num_keep)
        ordered = held.sort(dim=-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all(), "a token is held twice"
        assert (ordered[..., 0] >= 0).all(), "a position is negative"
        assert (ordered[..., -1] < order.num_logical).all(), "a position lies in the future"
        newest = ordered[..., -self.config.kv_window :]
        expected = torch.arange(order.num_logical - self.config.kv_window, order.num_logical, device=held.device)
        assert (newest == expected).all(), "the observation window was evicted"
        assert ((held < request.protected).sum(-1) == request.protected).all(), "a protected prompt token was evicted"
        first = max(0, request.num_prompt - request.policy.num_question(self.config.kv_window))
        for position in range(first, min(request.num_prompt, order.num_logical)):
            assert (held == position).any(-1).all(), "a token of the question was evicted"
        assert order.num_logical - request.num_evicted == order.num_keep
        slots = [r.slot for r in self._requests.values()]
        assert len(set(slots) | set(self._free_slots)) == len(slots) + len(self._free_slots), "a state slot was lost"
