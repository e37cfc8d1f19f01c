"""The worker side of eviction, the same for every model runner: which tokens stay, and moving them.

The host knows all counts and never waits for the device. One `EvictionRuntime` lives in each worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import KVPolicyConfig, needs_of
from ..policies import Need, Policy, View, make_policy
from ..policies.selection import select_per_head, select_sentences
from ..scheduler.messages import Started, StepOrders
from ..scheduler.planner import Compaction, Observation
from ..sentences.tracker import SentenceState, SentenceTracker, TrackedTokens
from ..trace import TraceWriter
from .attention_mass import AttentionMass
from .paging import LayerPages, kernel_pages, to_device
from .positions import PositionSidecar
from .queries import QueryRing


class StepBatch(NamedTuple):
    """The requests of a step in batch order, their tokens contiguous.

    Attributes:
        request_ids: R ids.
        counts: int64 `[R]` tokens of each request in this step.
        starts: int64 `[R]` logical position of each one's first token.
    """

    request_ids: Sequence[str]
    counts: np.ndarray
    starts: np.ndarray


NEVER = np.iinfo(np.int64).max
"""First tracked position of a request whose sentences nobody reads."""


@dataclass
class _Request:
    """Host-side state of a managed request."""

    slot: int
    policy: Policy
    needs: Need
    protected: int
    num_evicted: int = 0
    num_placed: int = 0
    """slots whose positions are in the sidecar; later slots follow in order"""
    num_compactions: int = 0


class EvictionRuntime:
    """Keeps the caches of managed requests within their budgets.

    Args:
        config: the server's policy.
        num_slots: requests that can run at once.
        ring: observation queries, or None where no policy reads them.
        tracker: sentences, or None where no policy reads them.
        trace: writes what was kept, or None.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        num_slots: int,
        ring: QueryRing | None,
        tracker: SentenceTracker | None,
        trace: TraceWriter | None,
    ) -> None:
        self.config = config
        self.ring = ring
        self.tracker = tracker
        self.trace = trace
        self._requests: dict[str, _Request] = {}
        self._free_slots = list(reversed(range(num_slots)))
        # By slot, so that a step needs no loop over requests; the last entry is for unmanaged requests.
        self._nobody = num_slots
        self._evicted = np.zeros(num_slots + 1, dtype=np.int32)
        self._observed = np.zeros(num_slots + 1, dtype=bool)
        self._first_tracked = np.full(num_slots + 1, NEVER, dtype=np.int64)
        self._mass = AttentionMass()
        self._layers: list[LayerPages] = []
        self._positions: PositionSidecar | None = None
        self._pages_per_block = 1
        self._batch: StepBatch | None = None
        self._slots = np.zeros(0, dtype=np.int64)
        self.num_compactions = 0

    def bind_cache(self, layers: list[LayerPages], block_size: int) -> None:
        """Give the runtime the KV pages, once they are allocated.

        Args:
            layers: in model order.
            block_size: tokens of one of vLLM's blocks; a multiple of the kernels' page size.
        """
        self._layers = layers
        self._pages_per_block = block_size // layers[0].page_size
        self._positions = PositionSidecar(len(layers), layers[0])

    # ---- before the forward pass

    def begin_step(self, orders: StepOrders | None, finished: Iterable[str], preempted: Iterable[str]) -> None:
        """Carry out the orders of a step. Call it before anything else of the step touches the cache.

        Args:
            orders: from the scheduler; None in a step that carries none.
            finished: requests that ended.
            preempted: requests that lost their cache and may start over.
        """
        for request_id in (*finished, *preempted):
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._free_slots.append(request.slot)
                self._mass.forget(request.slot)
        if self.trace is not None:
            self.trace.finished(finished)
        if orders is None:
            return
        for observation in orders.observations:
            self._observe(observation)
        for compaction in orders.compactions:
            self._compact(compaction)
        for started in orders.started:
            self._start(started)

    def _start(self, started: Started) -> None:
        policy = self.config.policy if started.policy == self.config.kv_policy else make_policy(started.policy)
        old = self._requests.pop(started.request_id, None)
        slot = self._free_slots.pop() if old is None else old.slot
        self._requests[started.request_id] = _Request(
            slot=slot,
            policy=policy,
            needs=needs_of(policy, self.config.kv_granularity),
            protected=started.protected,
        )
        needs = self._requests[started.request_id].needs
        self._mass.forget(slot)
        self._evicted[slot] = 0
        self._observed[slot] = bool(needs & Need.QUERIES)
        self._first_tracked[slot] = started.first_tracked if needs & Need.SENTENCES else NEVER
        if self.tracker is not None:
            self.tracker.reset(slot, started.first_tracked)
        if self.trace is not None:
            self.trace.started(started.request_id)

    def prepare(self, batch: StepBatch) -> np.ndarray | None:
        """Get ready for the forward pass over a batch.

        Returns:
            int32 `[R]` tokens each request has evicted, to be taken off its sequence length and slot
            positions (never off its RoPE positions); None where nobody has evicted any.
        """
        self._batch = batch
        self._slots = self._slots_of(batch.request_ids)
        if self.ring is not None:
            observed = np.where(self._observed[self._slots], self._slots, -1)
            self.ring.prepare(observed, batch.counts, batch.starts)
        evicted = self._evicted[self._slots]
        return evicted if evicted.any() else None

    def prepare_dummy(self) -> None:
        """Get ready for a forward pass without requests: profiling, graph capture, idle data-parallel rank."""
        self._batch = None
        if self.ring is not None:
            self.ring.idle()

    def num_evicted(self, request_id: str) -> int:
        """Tokens of this request that are no longer held."""
        request = self._requests.get(request_id)
        return 0 if request is None else request.num_evicted

    def _slots_of(self, request_ids: Sequence[str]) -> np.ndarray:
        found = (self._requests.get(request_id) for request_id in request_ids)
        return np.fromiter((self._nobody if r is None else r.slot for r in found), np.int64, len(request_ids))

    # ---- after the forward pass

    def finish_forward(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Let the sentence tracker read what the forward pass produced.

        Args:
            token_ids: `[>= T]` the step's input ids on the device.
            hidden: `[>= T, E]` last hidden states, after the final norm.
        """
        batch, self._batch = self._batch, None
        if self.tracker is None or batch is None:
            return
        # Of each request the tokens from its first tracked position on, with their places in the step.
        skipped = np.clip(self._first_tracked[self._slots] - batch.starts, 0, batch.counts)
        fresh = batch.counts - skipped
        rows = fresh > 0
        if not rows.any():
            return
        counts = fresh[rows]
        bounds = np.concatenate([[0], counts.cumsum()])
        request = np.repeat(np.arange(counts.shape[0]), counts)
        offset = np.arange(bounds[-1]) - bounds[request]
        token = (batch.counts.cumsum() - fresh)[rows][request] + offset
        position = (batch.starts + skipped)[rows][request] + offset
        parts = [token, position, request, bounds, self._slots[rows]]
        # One copy to the device for all of them.
        packed = to_device(np.concatenate(parts), torch.int64, token_ids.device)
        tokens, positions, request_of, starts, slots = packed.split([len(part) for part in parts])
        self.tracker.update(
            TrackedTokens(
                token_ids=token_ids[tokens],
                positions=positions,
                request=request_of,
                starts=starts,
                slots=slots,
                hidden=hidden[tokens] if self.tracker.has_embeddings else None,
            )
        )

    # ---- attention mass

    def _observe(self, order: Observation) -> None:
        """Add the attention of the newest queries to the mass of the tokens they saw."""
        request = self._requests[order.request_id]
        assert self._positions is not None
        assert self.ring is not None
        pages = kernel_pages(order.pages, self._pages_per_block, self._layers[0].raw.device)
        positions = self._positions.read(pages, order.num_resident, request.num_placed, request.num_evicted)
        received = []
        for i, layer in enumerate(self._layers):
            queries = self.ring.read(i, request.slot, order.num_logical)[-order.num_queries :]
            keys = layer.keys.read_pages(pages, order.num_resident)
            received.append(ops.attention_received(queries, keys, positions[i]))
        self._mass.add(request.slot, torch.stack(received))

    # ---- compaction

    def _compact(self, order: Compaction) -> None:
        """Choose the survivors of one request and move them to the front of its pages."""
        request = self._requests[order.request_id]
        if (request.num_evicted, request.num_compactions) != (order.num_evicted_before, order.ordinal):
            raise RuntimeError(
                f"scheduler and worker disagree about {order.request_id}: evicted {order.num_evicted_before} tokens in "
                f"{order.ordinal} compactions by the scheduler, {request.num_evicted} in {request.num_compactions} here"
            )
        assert self._positions is not None
        device = self._layers[0].raw.device
        source_pages = kernel_pages(order.source_pages, self._pages_per_block, device)
        target_pages = kernel_pages(order.target_pages, self._pages_per_block, device)
        positions = self._positions.read(source_pages, order.num_resident, request.num_placed, request.num_evicted)
        by_position = positions.argsort(dim=-1)
        sorted_positions = positions.gather(-1, by_position)

        sentences = self._sentences(request)
        kept_sorted = self._select(request, order, source_pages, by_position, sorted_positions, sentences)
        kept = torch.zeros_like(kept_sorted).scatter(-1, by_position, kept_sorted)
        source, hole, valid = ops.move_list(kept, order.num_keep)

        replaced = [
            i for i, (old, new) in enumerate(zip(order.source_pages, order.target_pages, strict=False)) if old != new
        ]
        if replaced:
            old = kernel_pages([order.source_pages[i] for i in replaced], self._pages_per_block, device)
            new = kernel_pages([order.target_pages[i] for i in replaced], self._pages_per_block, device)
        for i, layer in enumerate(self._layers):
            if replaced:
                layer.copy_pages(old, new)
            layer.move(source_pages, target_pages, source[i], hole[i], valid[i])
        self._positions.write(target_pages, positions, order.num_keep, source, hole, valid)
        if request.needs & Need.ATTENTION_MASS:
            self._mass.move(request.slot, order.num_keep, source, hole, valid)

        request.num_evicted += order.num_resident - order.num_keep
        self._evicted[request.slot] = request.num_evicted
        request.num_placed = order.num_keep
        request.num_compactions += 1
        self.num_compactions += 1
        if self.trace is not None:
            survivors = sorted_positions[kept_sorted].view(*positions.shape[:2], order.num_keep)
            self.trace.compacted(order, survivors, self.tracker, request.slot)
        if self.config.kv_check_integrity:
            self.check_integrity(order)

    def _sentences(self, request: _Request) -> SentenceState | None:
        if self.tracker is None or not request.needs & Need.SENTENCES:
            return None
        return self.tracker.state(request.slot)

    def _select(
        self,
        request: _Request,
        order: Compaction,
        source_pages: Tensor,
        by_position: Tensor,
        positions: Tensor,
        sentences: SentenceState | None,
    ) -> Tensor:
        """Score all layers and choose; bool `[layers, H, L]` in positional order."""
        policy, window = request.policy, self.config.kv_window
        penalty = None
        if policy.needs & Need.HIDDEN:
            assert sentences is not None
            penalty = sentences.penalty_of(positions)
        mass = None
        if policy.needs & Need.ATTENTION_MASS:
            mass = self._mass.read(request.slot, positions).gather(-1, by_position)
        scores = []
        for i, layer in enumerate(self._layers):
            keys = queries = None
            if policy.needs & Need.KEYS:
                held = layer.keys.read_pages(source_pages, order.num_resident)
                index = by_position[i][..., None].expand(-1, -1, held.shape[-1])
                keys = held.gather(1, index).transpose(0, 1)
            if policy.needs & Need.QUERIES:
                assert self.ring is not None
                queries = self.ring.read(i, request.slot, order.num_logical)
            view = View(
                positions=positions[i],
                window=window,
                num_keep=order.num_keep,
                layer=i,
                keys=keys,
                queries=queries,
                sentence_penalty=None if penalty is None else penalty[i],
                attention_mass=None if mass is None else mass[i],
            )
            scores.append(policy.score(view))
        pinned = (positions < max(request.protected, policy.num_sinks)) | (positions >= order.num_logical - window)
        if self.config.kv_granularity == "head":
            return select_per_head(torch.stack(scores), pinned, order.num_keep)
        # All layers and heads hold the same tokens, so the first row speaks for all.
        assert sentences is not None
        number = sentences.sentence_of(positions[0, 0])
        kept = select_sentences(torch.stack(scores), pinned[0, 0], number, order.num_keep)
        return kept.expand_as(pinned)

    # ---- checks

    def check_integrity(self, order: Compaction) -> None:
        """Verify a request's state right after its compaction. Synchronises; for tests and bug reports.

        Raises:
            AssertionError: a token is held twice, out of range or missing although it must survive.
        """
        assert self._positions is not None
        request = self._requests[order.request_id]
        pages = kernel_pages(order.target_pages, self._pages_per_block, self._layers[0].raw.device)
        held = self._positions.read(pages, order.num_keep, request.num_placed, request.num_evicted)
        ordered = held.sort(dim=-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all(), "a token is held twice"
        assert (ordered[..., 0] >= 0).all(), "a position is negative"
        assert (ordered[..., -1] < order.num_logical).all(), "a position lies in the future"
        newest = ordered[..., -self.config.kv_window :]
        expected = torch.arange(order.num_logical - self.config.kv_window, order.num_logical, device=held.device)
        assert (newest == expected).all(), "the observation window was evicted"
        assert ((held < request.protected).sum(-1) == request.protected).all(), "a protected prompt token was evicted"
        assert order.num_logical - request.num_evicted == order.num_keep
        slots = [r.slot for r in self._requests.values()]
        assert len(set(slots) | set(self._free_slots)) == len(slots) + len(self._free_slots), "a state slot was lost"
