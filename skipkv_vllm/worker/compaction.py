"""Carries out the compactions of a step: score, select and compact, for all requests and layers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import KVPolicyConfig
from ..core.device import to_device
from ..core.limits import ceil_div
from ..core.needs import ACCUMULATED, REPEATS, Need
from ..core.orders import Accumulation, Compaction
from ..ops.paging import LayerPages, PagedCache, layer_pages
from ..policies import Measured, Policy, View
from ..policies.base import Segments
from ..policies.selection import select_sentences
from .cache import PositionSidecar
from .ranks import ALONE, Ranks
from .signals.attention_mass import AttentionSums
from .signals.gates import TokenGates
from .signals.queries import QueryRing
from .signals.segments import SegmentTable
from .signals.sentences import SentenceTracker, look_up

MOST_TOKENS = 2**16
"""Held tokens that one call of an operator takes, requests times the longest of them. Temporary tensors have some 60
bytes for each, layer and kv head, and vLLM's profiling does not see them."""

DECAY_TOKENS = 128
"""Tokens after which sums are multiplied by `Policy.decay`; a compaction follows after each buffer."""


@dataclass
class Managed:
    """Host-side state of a managed request."""

    slot: int
    policy: Policy
    needs: Need
    protected: int
    num_evicted: int = 0
    num_placed: int = 0
    """slots whose positions are in the sidecar; later slots follow in order"""
    num_compactions: int = 0
    num_prompt: int = 0
    first_draft: Tensor | None = None
    """likeliest token after the prompt, where tokens are decoded ahead from it"""
    lookahead_queries: Tensor | None = None
    """queries of tokens computed ahead `[layers, n, Hq, D]`, for the compaction under way"""
    num_question: int = 0
    """how many of them lie behind the held tokens, for the policy to see"""

    @property
    def first_summed(self) -> int:
        """First slot with sums. Output errors rank only tokens that may leave; protected ones stay in front."""
        return self.protected if self.needs & Need.OUTPUT_ERROR else 0


class Job(NamedTuple):
    """A compaction and the state of its request before it."""

    order: Compaction
    request: Managed


class _Batch(NamedTuple):
    """What the operators need of R requests, on the device; all int32.

    Attributes:
        jobs: the requests.
        source_table, target_table: kernel pages before and after, `[R, pages]`.
        num_resident, num_keep, pin_below, pin_from, slot, num_logical: `[R]`.
        positions: `[R, layers, H, N]` by slot.
        gates: `[R, layers, H, N]` by slot, where the policy reads them.
        sentences: of every logical position, where they come from another stage; see `Compactor._announced`.
    """

    jobs: Sequence[Job]
    source_table: Tensor
    target_table: Tensor
    num_resident: Tensor
    num_keep: Tensor
    pin_below: Tensor
    pin_from: Tensor
    slot: Tensor
    num_logical: Tensor
    positions: Tensor
    gates: Tensor | None = None
    sentences: Tensor | None = None

    @property
    def longest(self) -> int:
        """Logical length of the longest request."""
        return max(order.num_logical for order, _ in self.jobs)


class Moves(NamedTuple):
    """Move lists of R requests, as `select_keep` gives them."""

    source: Tensor
    hole: Tensor
    number: Tensor

    @property
    def valid(self) -> Tensor:
        """bool, of the shape of `source`."""
        return torch.arange(self.source.shape[-1], device=self.source.device) < self.number[..., None]


class Compactor:
    """Chooses survivors and moves them to the front of each request's pages.

    Args:
        config: the server's policy.
        cache: the KV pages.
        block_size: tokens of one of vLLM's blocks; a multiple of the kernels' page size.
        ring, tracker, gates, sums, segments: what the runtime collects.
        ranks: this worker's place among those that share the model.
        key_scales: float32 `[layers, H]` by which stored keys must be multiplied, or None for 1.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        cache: PagedCache,
        block_size: int,
        ring: QueryRing | None,
        tracker: SentenceTracker | None,
        gates: TokenGates | None,
        sums: AttentionSums,
        segments: SegmentTable,
        ranks: Ranks = ALONE,
        key_scales: Tensor | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.positions = PositionSidecar(cache)
        self.layers: list[LayerPages] = [layer_pages(each, cache.layout) for each in cache.caches]
        self.device = cache.pointers.device
        self._block_size = block_size
        self._pages_per_block = block_size // self.layers[0].page_size
        self._key_scales = key_scales
        self._ring, self._tracker, self._gates, self._ranks = ring, tracker, gates, ranks
        self._sums, self._segments = sums, segments
        self._score_tokens = ops.function("score_tokens", self.device)
        self._measure_attention = ops.function("measure_attention", self.device)
        self._key_similarity = ops.function("key_similarity", self.device)
        self._select_keep = ops.function("select_keep", self.device)
        self._compact_pages = ops.function("compact_pages", self.device)
        ops.warn_if_slow(self.device.type)

    def table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Block ids of R requests as kernel page ids, int32 `[R, pages]`, padded with page 0."""
        blocks = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
        for r, row in enumerate(rows):
            blocks[r, : len(row)] = row
        if (ratio := self._pages_per_block) > 1:
            blocks = (blocks[..., None] * ratio + np.arange(ratio, dtype=np.int32)).reshape(len(rows), -1)
        return to_device(blocks, torch.int32, self.device)

    def keys(self, layer: int, pages: Tensor, length: int) -> Tensor:
        """The first `length` keys of a request in these kernel pages, `[H, length, D]` in slot order."""
        held = self.layers[layer].keys.read_pages(pages, length)
        return held if self._key_scales is None else held * self._key_scales[layer, :, None, None]

    def _queries(self, orders: Sequence[tuple[Compaction | Accumulation, Managed]], count: int) -> Tensor:
        """The last `count` queries as `score_tokens` takes them: `[R, layers, count, Hq, D]`."""
        assert self._ring is not None
        slots, lengths = [request.slot for _, request in orders], [order.num_logical for order, _ in orders]
        queries = self._ring.read_all(slots, lengths, count)
        if self.cache.caches[0].element_size() == 1:
            queries = queries.float()
        if self._key_scales is None:
            return queries
        # `q . (scale * k)` is `(scale * q) . k`, and cosines know no scale: so the operator reads keys as they are.
        group = queries.shape[3] // self._key_scales.shape[1]
        return queries * self._key_scales.repeat_interleave(group, dim=1)[:, None, :, None]

    def accumulate(self, orders: Sequence[tuple[Accumulation, Managed]]) -> None:
        """Add what the newest queries of requests attend to, or what leaving each token out would change."""
        for by_error in (False, True):
            part: list[tuple[Accumulation, Managed]] = []
            same = [each for each in orders if bool(each[1].needs & Need.OUTPUT_ERROR) is by_error]
            for each in sorted(same, key=lambda each: each[0].num_resident):
                if part and (len(part) + 1) * each[0].num_resident > MOST_TOKENS:
                    self._accumulate(part, by_error)
                    part = []
                part.append(each)
            if part:
                self._accumulate(part, by_error)

    def _accumulate(self, orders: Sequence[tuple[Accumulation, Managed]], output_error: bool) -> None:
        numbers = [(o.num_resident, o.num_queries, o.num_logical - 1, r.num_placed, r.num_evicted) for o, r in orders]
        columns = to_device(np.array(numbers, dtype=np.int32).T.copy(), torch.int32, self.device)
        resident, num_queries, newest, num_placed, num_evicted = columns.unbind()
        table = self.table([order.blocks for order, _ in orders])
        positions = self.positions.read(table, max(o.num_resident for o, _ in orders), num_placed, num_evicted)
        queries = self._queries(orders, max(order.num_queries for order, _ in orders))
        found = self._measure_attention(
            *self.cache, table, positions, resident, queries, num_queries, newest, output_error
        )
        parts = [found]
        if output_error:
            # How many of the queries see each token.
            seen_by = newest.view(-1, 1, 1, 1) + 1 - positions
            parts.append(seen_by.clamp_(min=0).minimum(num_queries.view(-1, 1, 1, 1)))
        for r, (order, request) in enumerate(orders):
            own = slice(request.first_summed, order.num_resident)
            self._sums.add(request.slot, [part[r, ..., own] for part in parts])

    def run(self, jobs: Sequence[Job]) -> None:
        """Carry out the compactions of a step, in order."""
        for part in self._independent(jobs):
            self._run(part)

    def _independent(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Runs of jobs that one launch may carry out: same policy, not too many tokens, and no page written by one and
        used by another. All ranks find the same runs.

        A page that an earlier job gives up may be the fresh page of a later one.
        """
        part: list[Job] = []
        read: set[int] = set()
        written: set[int] = set()
        longest = 0
        for job in jobs:
            longest = max(longest, job.order.num_resident)
            uses = set(job.order.source_blocks)
            # Pages that lie wholly in a protected prompt may be shared, but nothing in them changes.
            writes = set(job.order.target_blocks[job.request.protected // self._block_size :])
            differs = part and job.request.policy != part[0].request.policy
            is_full = (len(part) + 1) * longest > MOST_TOKENS
            if part and (differs or is_full or writes & (read | written) or uses & written):
                yield part
                part, read, written, longest = [], set(), set(), job.order.num_resident
            part.append(job)
            read |= uses
            written |= writes
        if part:
            yield part

    def _run(self, jobs: Sequence[Job]) -> None:
        batch = self._batch(jobs)
        if self._ranks.num_stages > 1 and jobs[0].request.needs & (REPEATS | Need.SENTENCES):
            batch = batch._replace(sentences=self._announced(batch))
        scores = self._scores(batch)
        by_head = self.config.kv_granularity == "head"
        moves = self._select_tokens(batch, scores) if by_head else self._select_sentences(batch, scores)
        self._compact_pages(
            *self.cache,
            self.positions.entries,
            batch.positions,
            batch.source_table,
            batch.target_table,
            batch.num_keep,
            *moves,
        )
        if jobs[0].request.needs & ACCUMULATED or batch.gates is not None:
            self._follow(batch, moves)

    def _follow(self, batch: _Batch, moves: Moves) -> None:
        """Let what is kept beside the pages follow its tokens."""
        source, hole, valid = moves.source.long(), moves.hole.long(), moves.valid
        if batch.gates is not None:
            assert self._gates is not None
            for r, (order, _) in enumerate(batch.jobs):
                self._gates.move(batch.gates[r], batch.target_table[r], order.num_keep, source[r], hole[r], valid[r])
        leader = batch.jobs[0].request  # all have its policy
        if not leader.needs & ACCUMULATED:
            return
        decay = leader.policy.decay ** (self.config.kv_buffer / DECAY_TOKENS)
        first = to_device([[[[request.first_summed]]] for _, request in batch.jobs], torch.int64, self.device)
        # Padding names slot 0, which may have no sum; it goes to a place beyond the kept ones.
        source = (source - first).clamp_(min=0)
        target = torch.where(valid, hole, batch.num_keep.view(-1, 1, 1, 1)) - first
        for r, (order, request) in enumerate(batch.jobs):
            self._sums.move(request.slot, order.num_keep - request.first_summed, source[r], target[r], decay)

    def _batch(self, jobs: Sequence[Job]) -> _Batch:
        numbers = [
            (
                order.num_resident,
                order.num_keep,
                max(request.protected, request.policy.num_sinks),
                order.num_logical - self.config.kv_window,
                request.slot,
                request.num_placed,
                request.num_evicted,
                order.num_logical,
            )
            for order, request in jobs
        ]
        columns = to_device(np.array(numbers, dtype=np.int32).T.copy(), torch.int32, self.device)
        resident, keep, below, from_, slot, num_placed, num_evicted, logical = columns.unbind()
        source_table = self.table([job.order.source_blocks for job in jobs])
        length = max(job.order.num_resident + job.request.num_question for job in jobs)
        positions = self.positions.read(source_table, length, num_placed, num_evicted)
        target_table = self.table([job.order.target_blocks for job in jobs])
        gates = None
        if jobs[0].request.needs & Need.GATES:
            assert self._gates is not None
            gates = self._gates.read(source_table, length)
        return _Batch(jobs, source_table, target_table, resident, keep, below, from_, slot, logical, positions, gates)

    # ---- sentences

    def _announced(self, batch: _Batch) -> Tensor:
        """What the last stage knows of sentences, for a pipeline's stages: penalty and number of every position.

        Returns:
            float32 `[2, R, longest]` by logical position.
        """
        said = torch.zeros(2, len(batch.jobs), batch.longest, dtype=torch.float32, device=self.device)
        if self._tracker is not None:
            order = torch.arange(batch.longest, dtype=torch.int32, device=self.device)
            every = order.expand(len(batch.jobs), 1, 1, -1)
            said[0] = self._tracker.penalties(batch.slot, every, batch.num_logical, batch.longest)[:, 0, 0]
            for r, (_, request) in enumerate(batch.jobs):
                said[1, r] = self._tracker.state(request.slot).sentence_of(order)
        return self._ranks.from_last_stage(said)

    def _penalties(self, batch: _Batch) -> Tensor:
        """float32, of the shape of `batch.positions`."""
        if batch.sentences is None:
            assert self._tracker is not None
            return self._tracker.penalties(batch.slot, batch.positions, batch.num_logical, batch.longest)
        return look_up(batch.sentences[0], batch.positions)

    def _numbers(self, batch: _Batch, r: int, positions: Tensor) -> Tensor:
        """Sentence numbers, int64, of positions of one request."""
        if batch.sentences is None:
            assert self._tracker is not None
            return self._tracker.state(batch.jobs[r].request.slot).sentence_of(positions)
        return batch.sentences[1, r, positions.long()].long()

    # ---- scores

    def _scores(self, batch: _Batch) -> Tensor:
        """float32 `[R, layers, H, N]` by slot."""
        policy = batch.jobs[0].request.policy
        penalty = self._penalties(batch) if policy.needs & REPEATS else None
        if policy.needs & Need.OUTPUT_ERROR:
            return self._ranked(batch, torch.zeros((), device=self.device) if penalty is None else penalty)
        if (fused := policy.token_score) is not None:
            scores: Tensor = self._score_tokens(
                *self.cache,
                batch.source_table,
                batch.positions,
                batch.num_resident,
                self._queries(batch.jobs, self.config.kv_window),
                penalty,
                fused.pool,
                fused.mix,
                fused.redundancy_threshold,
            )
            return scores
        scores = torch.full(batch.positions.shape, -torch.inf, dtype=torch.float32, device=self.device)
        for r in range(len(batch.jobs)):
            self._score_request(batch, r, None if penalty is None else penalty[r], scores[r])
        return scores

    def _ranked(self, batch: _Batch, repeated: Tensor) -> Tensor:
        """Scores by what was measured since each token was written, float32 `[R, layers, H, N]` by slot."""
        policy, length = batch.jobs[0].request.policy, batch.positions.shape[-1]
        sums = torch.zeros(2, *batch.positions.shape, dtype=torch.float32, device=self.device)
        for r, (order, request) in enumerate(batch.jobs):
            own = sums[:, r, ..., request.first_summed : order.num_resident]
            own.copy_(self._sums.read(request.slot, 2, own[0]))
        error, seen_by = sums
        recent_from = [
            [[[order.num_logical - policy.num_recent(order.num_keep, request.protected)]]]
            for order, request in batch.jobs
        ]
        resident, below, from_ = (x.view(-1, 1, 1, 1) for x in (batch.num_resident, batch.pin_below, batch.pin_from))
        is_held = torch.arange(length, dtype=torch.int32, device=self.device) < resident
        measured = Measured(
            error / seen_by.clamp(min=1),
            self._key_similarity(*self.cache, batch.source_table, batch.num_resident, length),
            repeated,
            batch.positions >= to_device(recent_from, torch.int32, self.device),
            is_held & (batch.positions >= below) & (batch.positions < from_),
        )
        return policy.rank(measured).masked_fill(~is_held, -torch.inf)

    def _score_request(self, batch: _Batch, r: int, penalty: Tensor | None, scores: Tensor) -> None:
        """Let the policy score one request layer by layer, in ascending position; `scores` `[layers, H, N]` by slot."""
        order, request = batch.jobs[r]
        policy, length = request.policy, order.num_resident + request.num_question
        by_position = batch.positions[r, ..., :length].argsort(dim=-1)
        positions = batch.positions[r, ..., :length].gather(-1, by_position)
        pages = batch.source_table[r, : ceil_div(length, self.layers[0].page_size)].long()
        mass = None
        if policy.needs & Need.ATTENTION_MASS:
            mass = self._sums.read(request.slot, 1, positions)[0].gather(-1, by_position)
        numbers, segments = None, None
        if policy.needs & Need.SEGMENTS:
            segments = self._known_segments(order, request)
            number = (positions - request.protected).div(segments.longest, rounding_mode="floor").clamp(min=-1)
            in_window = positions >= order.num_logical - self.config.kv_window
            numbers = torch.where(in_window, len(segments.sizes), number).long()
        gates = None if batch.gates is None else batch.gates[r, ..., :length].gather(-1, by_position)
        for i, layer in enumerate(self.layers):
            keys = values = queries = None
            if policy.needs & Need.KEYS:
                keys = _in_order(self.keys(i, pages, length), by_position[i])
            if policy.needs & Need.VALUES:
                # Their scale, where 8 bits are stored, is one for all tokens and changes no order.
                values = _in_order(layer.values.read_pages(pages, length), by_position[i])
            if policy.needs & Need.QUERIES:
                assert self._ring is not None
                queries = self._ring.read(i, request.slot, order.num_logical, self.config.kv_window)
            lookahead = None if request.lookahead_queries is None else request.lookahead_queries[i]
            if request.num_question:
                queries, lookahead = lookahead, None
            view = View(
                positions=positions[i],
                window=self.config.kv_window,
                num_keep=order.num_keep,
                num_logical=order.num_logical,
                num_prompt=request.num_prompt,
                num_protected=request.protected,
                layer=self._ranks.first_layer + i,
                first_head=self._ranks.first_head,
                keys=keys,
                values=values,
                queries=queries,
                sentence_penalty=None if penalty is None else penalty[i, :, :length].gather(-1, by_position[i]),
                attention_mass=None if mass is None else mass[i],
                segment=None if numbers is None else numbers[i],
                segments=segments,
                gates=None if gates is None else gates[i],
                lookahead_queries=lookahead,
            )
            scores[i, :, :length].scatter_(-1, by_position[i], policy.score(view))

    def _known_segments(self, order: Compaction, request: Managed) -> Segments:
        """What is known of a request's segments, once its method has noted what it keeps of them."""
        policy, window = request.policy, self.config.kv_window
        length, written = policy.segment_options.length, order.num_logical - window - request.protected
        count = ceil_div(written, length)
        known = Segments(
            *self._segments.read(request.slot, count, self.device),
            sizes=(written - length * torch.arange(count, device=self.device)).clamp(max=length),
            num_free=order.num_keep - request.protected - window,
            longest=length,
        )
        memory = policy.remember(known)
        self._segments.remember(request.slot, memory)
        return dataclasses.replace(known, memory=memory)

    # ---- selection

    def _num_task(self, batch: _Batch) -> int:
        return batch.jobs[0].request.policy.num_question(self.config.kv_window)

    def _is_question(self, batch: _Batch, positions: Tensor, num_prompt: Tensor | int) -> Tensor:
        """Which positions the method keeps because they are the question, bool."""
        return (positions >= num_prompt - self._num_task(batch)) & (positions < num_prompt)

    def _select_tokens(self, batch: _Batch, scores: Tensor) -> Moves:
        """Every layer and head keeps its own tokens."""
        if self._num_task(batch):
            # The operator pins both ends only.
            ends = [[[[request.num_prompt]]] for _, request in batch.jobs]
            question = self._is_question(batch, batch.positions, to_device(ends, torch.int32, self.device))
            scores = scores.masked_fill(question, torch.finfo(scores.dtype).max)
        most = max(min(o.num_keep, o.num_resident - o.num_keep) for o, _ in batch.jobs)
        numbers = (batch.num_resident, batch.num_keep, batch.pin_below, batch.pin_from)
        return Moves(*self._select_keep(scores, batch.positions, *numbers, most))

    def _select_sentences(self, batch: _Batch, scores: Tensor) -> Moves:
        """Whole sentences leave, the same for all layers and heads, so the first row speaks for all."""
        layers, heads = scores.shape[1:3]
        shared = self._ranks.mean(scores)
        rows = []
        for r, (order, request) in enumerate(batch.jobs):
            length = order.num_resident
            by_position = batch.positions[r, 0, 0, :length].argsort()
            positions = batch.positions[r, 0, 0, :length][by_position]
            pinned = (positions < batch.pin_below[r]) | (positions >= batch.pin_from[r])
            if self._num_task(batch):
                pinned |= self._is_question(batch, positions, request.num_prompt)
            number = self._numbers(batch, r, positions)
            kept_sorted = select_sentences(shared[r, :length][by_position], pinned, number, order.num_keep)
            kept = torch.zeros_like(kept_sorted).scatter(0, by_position, kept_sorted)
            rows.append(ops.move_list(kept, order.num_keep))
        most = max(source.shape[0] for source, _, _ in rows)
        source, hole = (
            torch.stack(
                [torch.nn.functional.pad(torch.where(row[2], row[i], 0), (0, most - row[2].shape[0])) for row in rows]
            )
            for i in (0, 1)
        )
        count = torch.stack([valid.sum() for _, _, valid in rows])
        shape = (len(rows), layers, heads)
        return Moves(
            source.int()[:, None, None].expand(*shape, -1).contiguous(),
            hole.int()[:, None, None].expand(*shape, -1).contiguous(),
            count.int()[:, None, None].expand(shape).contiguous(),
        )


def _in_order(held: Tensor, by_position: Tensor) -> Tensor:
    """Vectors `[H, L, D]` by slot as `[L, H, D]` in ascending position."""
    return held.gather(1, by_position[..., None].expand_as(held)).transpose(0, 1)
