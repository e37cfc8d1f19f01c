"""Sums over all queries of a request for every token that it holds: attention mass, or output error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...core.device import to_device
from ...core.limits import ceil_div
from ...core.needs import ACCUMULATED, Need
from ..cache import KVCache
from ..compaction_batch import CompactionBatch, Moves, in_parts
from ..requests import ManagedRequest, Reading
from .base import Inputs, Signal
from .queries import QueryRing

DECAY_TOKENS = 128
"""Tokens after which sums are multiplied by `Policy.decay`; a compaction follows after each buffer."""


class AttentionMass(Signal):
    """Adds up what queries attend to, or what leaving each token out would change in their outputs.

    Args:
        ring: the newest queries.
        buffer: tokens between two compactions.
        needs: what the methods of the server need.

    Attributes:
        sums: of requests whose methods need attention mass, or output error (True).
    """

    def __init__(self, ring: QueryRing, buffer: int, needs: Need) -> None:
        self.sums: dict[bool, AttentionSums] = {}
        self._ring = ring
        self._buffer = buffer
        self._needs = needs

    def bind_cache(self, cache: KVCache) -> None:
        self._cache = cache
        self._measure_attention = ops.function("measure_attention", cache.device, cache.pages.layout)
        layers, pages, heads, page_size = cache.sidecar.shape
        num_blocks = pages * page_size // cache.block_size
        for by_error, need in ((False, Need.ATTENTION_MASS), (True, Need.OUTPUT_ERROR)):
            if self._needs & need:
                # Errors are summed with the number of queries that saw the token.
                shape = (2 if by_error else 1, layers, heads, cache.block_size)
                self.sums[by_error] = AttentionSums(shape, num_blocks, cache.device)

    def forget(self, row: int) -> None:
        for sums in self.sums.values():
            sums.forget(row)

    def accumulate(self, readings: Sequence[Reading]) -> None:
        for by_error in (False, True):
            same = [
                each
                for each in readings
                if each.request.needs & ACCUMULATED and bool(each.request.needs & Need.OUTPUT_ERROR) is by_error
            ]
            for part in in_parts(same, self._cache.room):
                self._accumulate(part, by_error)

    def _accumulate(self, readings: Sequence[Reading], output_error: bool) -> None:
        numbers = [
            (o.num_resident, o.num_queries, o.num_logical - 1, r.num_placed, o.num_logical - o.num_resident)
            for o, r in readings
        ]
        columns = to_device(np.array(numbers, dtype=np.int32).T.copy(), torch.int32, self._cache.device)
        resident, num_queries, newest, num_placed, num_evicted = columns.unbind()
        table = self._cache.table([order.blocks for order, _ in readings])
        longest, most_queries = (max(number[i] for number in numbers) for i in (0, 1))
        positions = self._cache.positions(table, longest, num_placed, num_evicted)
        rows, lengths = [request.row for _, request in readings], [order.num_logical for order, _ in readings]
        queries = self._cache.scale_queries(self._ring.newest(rows, lengths, most_queries))
        found = self._measure_attention(
            *(*self._cache.pages, table, positions, resident, queries, num_queries, newest, self._cache.sink_logits),
            ops.Effect.OUTPUT if output_error else ops.Effect.ATTENTION,
            0.0,
        )
        parts = [found]
        if output_error:
            # How many of the queries see each token.
            is_held = torch.arange(longest, dtype=torch.int32, device=found.device) < resident.view(-1, 1, 1, 1)
            seen_by = newest.view(-1, 1, 1, 1) + 1 - positions
            seen_by = seen_by.clamp_(min=0).minimum(num_queries.view(-1, 1, 1, 1))
            parts.append((seen_by * is_held).float())
        spans = [Span(request.row, request.first_summed, order.num_resident) for order, request in readings]
        self.sums[output_error].add(spans, torch.stack(parts))

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        if batch.needs & ACCUMULATED:
            spans = [Span(request.row, request.first_summed, order.num_resident) for order, request in batch.jobs]
            inputs.sums = self._sums_of(batch).read(spans, batch.length)

    def move(self, batch: CompactionBatch, inputs: Inputs, moves: Moves) -> None:
        if inputs.sums is None:
            return
        sums = moves.follow(inputs.sums, batch.num_keep)
        spans = [Span(request.row, request.first_summed, order.num_keep) for order, request in batch.jobs]
        most = max(span.end for span in spans)
        # The rest is cleared for the tokens to come.
        slots = torch.arange(most, dtype=torch.int32, device=sums.device)
        decay = batch.policy.decay ** (self._buffer / DECAY_TOKENS)
        factor = (slots < batch.num_keep.view(-1, 1, 1, 1)) * decay
        self._sums_of(batch).replace(spans, sums[..., :most] * factor)

    def exchange(self, request: ManagedRequest, came_from: Tensor, was_owner: Tensor, is_owner: Tensor) -> None:
        """Let sums follow the tokens of the request's region; those of an owner wait until it returns.

        Args:
            request: the request.
            came_from: int64 `[layers, H, n]`, where in the region each token was before; -1 if it was not there.
            was_owner, is_owner: bool `[layers, H, n]`, whether the owner of the slot was in it, and is.
        """
        assert request.region is not None
        if not request.needs & ACCUMULATED:
            return

        def follow(before: Tensor) -> Tensor:
            # Right after a compaction every owner is there.
            waiting = before if request.owner_sums is None else before.where(was_owner[..., None], request.owner_sums)
            moved = before.gather(2, came_from.clamp(min=0)[..., None].expand_as(before))
            request.owner_sums = waiting
            return moved.where(came_from[..., None] >= 0, waiting.where(is_owner[..., None], 0.0))

        self.sums[bool(request.needs & Need.OUTPUT_ERROR)].update(request.row, request.region.slots, follow)

    def _sums_of(self, batch: CompactionBatch) -> AttentionSums:
        return self.sums[bool(batch.needs & Need.OUTPUT_ERROR)]


class Span(NamedTuple):
    """Slots of a request whose tokens have sums: from `first` up to `end`."""

    row: int
    first: int
    end: int


class AttentionSums:
    """K sums of every token that a request holds, by slot, in blocks as large as those of the KV cache.

    They are kept by request and not by KV block, because requests that share a block attend to it differently. There
    are as many blocks as in the KV cache, allocated with it; requests that share many blocks may need more, which are
    then added.

    Args:
        shape: K, layers, H and P, the tokens of a block.
        num_blocks: blocks to allocate.
        device: where the model runs.
    """

    def __init__(self, shape: tuple[int, int, int, int], num_blocks: int, device: torch.device) -> None:
        self._size = shape[-1]
        self._entries = torch.zeros(num_blocks + 1, *shape, dtype=torch.float32, device=device)
        """float32 `[blocks, *shape]`; the first one stands in for blocks that do not exist"""
        self._free = list(range(num_blocks, 0, -1))
        self._blocks: dict[int, np.ndarray] = {}
        """row -> int64, block of sums of each block of the request; 0 for those without"""

    def forget(self, row: int) -> None:
        """Drop the sums of a row."""
        self._give_back(self._blocks.pop(row, np.zeros(0, dtype=np.int64)))

    def num_blocks(self, row: int) -> int:
        """Return how many blocks a row has."""
        return int(np.count_nonzero(self._blocks.get(row, 0)))

    def add(self, spans: Sequence[Span], found: Tensor) -> None:
        """Add numbers of R requests, float32 `[K, R, layers, H, N]` by slot; 0 past a request's span."""
        fresh: list[int] = []
        for row, first, end in spans:
            blocks = self._blocks.get(row, np.zeros(first // self._size, dtype=np.int64))
            missing = max(0, ceil_div(end, self._size) - len(blocks))
            taken = self._take(missing)
            self._blocks[row] = np.concatenate([blocks, np.array(taken, dtype=np.int64)])
            fresh += taken
        if fresh:
            self._entries.index_fill_(0, to_device(fresh, torch.int64, found.device), 0.0)
        by_block = self._by_block(found)
        self._entries.index_add_(0, self._index(spans, by_block.shape[1]), by_block.flatten(0, 1))

    def read(self, spans: Sequence[Span], length: int) -> Tensor:
        """Return the sums of R requests by slot, float32 `[K, R, layers, H, length]`; 0 where none was added."""
        self._entries[0].zero_()
        count = ceil_div(length, self._size)
        found = self._entries[self._index(spans, count)].unflatten(0, (len(spans), count))
        return found.permute(2, 0, 3, 4, 1, 5).flatten(-2)[..., :length]

    def replace(self, spans: Sequence[Span], kept: Tensor) -> None:
        """Replace the sums of R requests, float32 `[K, R, layers, H, N]` by slot; those past a span are dropped."""
        by_block = self._by_block(kept)
        self._entries.index_copy_(0, self._index(spans, by_block.shape[1]), by_block.flatten(0, 1))
        for row, _, end in spans:
            if row in self._blocks:
                count = ceil_div(end, self._size)
                self._give_back(self._blocks[row][count:])
                self._blocks[row] = self._blocks[row][:count]

    def update(self, row: int, slots: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of some slots `[layers, H, n]` of a request by what `change` makes of them.

        It gets and returns float32 `[layers, H, n, K]`, and is not called if the request has no sums.
        """
        if row not in self._blocks:
            return
        blocks = to_device(self._blocks[row], torch.int64, slots.device)
        layer, head = (torch.arange(count, device=slots.device) for count in slots.shape[:2])
        at = (blocks[slots // self._size], slice(None), layer[:, None, None], head[:, None], slots % self._size)
        self._entries[at] = change(self._entries[at])

    def _by_block(self, by_slot: Tensor) -> Tensor:
        """Arrange `[K, R, layers, H, N]` as `[R, blocks, K, layers, H, P]`."""
        padding = -by_slot.shape[-1] % self._size
        return F.pad(by_slot, (0, padding)).unflatten(-1, (-1, self._size)).permute(1, 4, 0, 2, 3, 5)

    def _index(self, spans: Sequence[Span], count: int) -> Tensor:
        """Return the blocks of sums of the first `count` blocks of each request, int64 `[R * count]`."""
        index = np.zeros((len(spans), count), dtype=np.int64)
        for r, (row, _, end) in enumerate(spans):
            own = self._blocks.get(row, index[r])[: min(count, ceil_div(end, self._size))]
            index[r, : len(own)] = own
        return to_device(index.ravel(), torch.int64, self._entries.device)

    def _take(self, count: int) -> list[int]:
        while len(self._free) < count:
            number = len(self._entries)
            self._entries = torch.cat([self._entries, torch.zeros_like(self._entries)])
            self._free = [*range(2 * number - 1, number - 1, -1), *self._free]
        return [self._free.pop() for _ in range(count)]

    def _give_back(self, blocks: np.ndarray) -> None:
        self._free += blocks[blocks > 0].tolist()
