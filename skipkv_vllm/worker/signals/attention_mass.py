"""Sums over all queries of a request for every token that it holds: attention mass, or output error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...core.device import to_device
from ...core.needs import ACCUMULATED, Need
from ..cache import KVCache
from ..compaction_batch import CompactionBatch, Moves
from ..requests import Reading
from .base import Inputs, Signal
from .queries import QueryRing

GROWTH = 256
"""Tokens by which a buffer grows."""

DECAY_TOKENS = 128
"""Tokens after which sums are multiplied by `Policy.decay`; a compaction follows after each buffer."""


class AttentionMass(Signal):
    """Adds up what queries attend to, or what leaving each token out would change in their outputs.

    Args:
        ring: the newest queries.
        buffer: tokens between two compactions.
    """

    def __init__(self, ring: QueryRing, buffer: int) -> None:
        self.sums = AttentionSums()
        self._ring = ring
        self._buffer = buffer

    def bind_cache(self, cache: KVCache) -> None:
        self._cache = cache
        self._measure_attention = ops.function("measure_attention", cache.device)

    def forget(self, row: int) -> None:
        self.sums.forget(row)

    def accumulate(self, readings: Sequence[Reading]) -> None:
        for by_error in (False, True):
            same = [
                each
                for each in readings
                if each.request.needs & ACCUMULATED and bool(each.request.needs & Need.OUTPUT_ERROR) is by_error
            ]
            part: list[Reading] = []
            for each in sorted(same, key=lambda each: each.order.num_resident):
                if part and (len(part) + 1) * each.order.num_resident > self._cache.slots_at_once:
                    self._accumulate(part, by_error)
                    part = []
                part.append(each)
            if part:
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
            *(*self._cache.pages, table, positions, resident, queries, num_queries, newest),
            ops.Effect.OUTPUT if output_error else ops.Effect.ATTENTION,
            0.0,
        )
        parts = [found]
        if output_error:
            # How many of the queries see each token.
            seen_by = newest.view(-1, 1, 1, 1) + 1 - positions
            parts.append(seen_by.clamp_(min=0).minimum(num_queries.view(-1, 1, 1, 1)))
        for r, (order, request) in enumerate(readings):
            own = slice(request.first_summed, order.num_resident)
            self.sums.add(request.row, [part[r, ..., own] for part in parts])

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        if not batch.needs & ACCUMULATED:
            return
        number = 2 if batch.needs & Need.OUTPUT_ERROR else 1
        shape = (number, *batch.positions.shape)
        inputs.sums = torch.zeros(shape, dtype=torch.float32, device=batch.positions.device)
        for r, (order, request) in enumerate(batch.jobs):
            own = inputs.sums[:, r, ..., request.first_summed : order.num_resident]
            own.copy_(self.sums.read(request.row, number, own[0]))

    def move(self, batch: CompactionBatch, inputs: Inputs, moves: Moves) -> None:
        if not batch.needs & ACCUMULATED:
            return
        decay = batch.policy.decay ** (self._buffer / DECAY_TOKENS)
        first_summed = [[[[request.first_summed]]] for _, request in batch.jobs]
        first = to_device(first_summed, torch.int64, batch.positions.device)
        # Padding names slot 0, which may have no sum; it goes to a place beyond the kept ones.
        source = (moves.source.long() - first).clamp_(min=0)
        target = torch.where(moves.valid, moves.hole.long(), batch.num_keep.view(-1, 1, 1, 1)) - first
        for r, (order, request) in enumerate(batch.jobs):
            self.sums.move(request.row, order.num_keep - request.first_summed, source[r], target[r], decay)


class AttentionSums:
    """float32 `[K, layers, H, capacity]` per running request: K sums by slot, growing with its resident length.

    They are kept by request and not by block, because requests that share a block attend to it differently.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def forget(self, row: int) -> None:
        """Drop the sums of a row."""
        self._sums.pop(row, None)

    def add(self, row: int, found: Sequence[Tensor]) -> None:
        """Add K tensors `[layers, H, length]`, float32 or integer, for the tokens in the first `length` slots."""
        length = found[0].shape[-1]
        for total, part in zip(self._sized(row, len(found), found[0]), found, strict=True):
            total[..., :length] += part

    def read(self, row: int, count: int, like: Tensor) -> Tensor:
        """Return K = `count` sums by slot, each of the shape of `like` `[layers, H, length]`; 0 if none was added."""
        return self._sized(row, count, like)[..., : like.shape[-1]]

    def move(self, row: int, num_keep: int, source: Tensor, target: Tensor, decay: float) -> None:
        """Follow a compaction, then multiply by `decay`.

        Args:
            row: row of the request.
            num_keep: number of sums that stay; the rest is cleared for the tokens to come.
            source, target: int64 `[layers, H, M]`, the moves; one whose target is `num_keep` is padding.
        """
        sums = self._sums[row]
        source, target = (x.expand(sums.shape[0], *x.shape) for x in (source, target))
        sums.scatter_(-1, target, sums.gather(-1, source))
        sums[..., num_keep:] = 0
        if decay != 1.0:
            sums *= decay

    def _sized(self, row: int, count: int, like: Tensor) -> Tensor:
        held, length = self._sums.get(row), like.shape[-1]
        if held is None or held.shape[-1] < length:
            capacity = (length // GROWTH + 1) * GROWTH
            grown = torch.zeros(count, *like.shape[:-1], capacity, dtype=torch.float32, device=like.device)
            if held is not None:
                grown[..., : held.shape[-1]] = held
            self._sums[row] = held = grown
        return held
