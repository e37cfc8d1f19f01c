"""Segments of fixed length and the sparsity of their attention, for methods that treat a stretch of text as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...core.device import to_device
from ...core.limits import ceil_div
from ...core.needs import Need
from ...ops.paging import PagedCache
from ...policies.base import SegmentOptions, Segments
from ..cache import KVCache
from ..compaction_batch import CompactionBatch, in_parts
from ..ranks import Ranks
from ..requests import Reading
from .base import Inputs, Signal
from .queries import QueryRing

UNSEEN = -1.0
"""Sparsity of a segment that is still being written."""


class SegmentSparsity(Signal):
    """Measures how sparse attention is at the end of each segment.

    Args:
        ring: the newest queries.
        window: W, number of newest tokens that always survive.
        ranks: this worker's place among those that share the model.
    """

    def __init__(self, ring: QueryRing, window: int, ranks: Ranks) -> None:
        self.table = SegmentTable()
        self._ring = ring
        self._window = window
        self._ranks = ranks

    def bind_cache(self, cache: KVCache) -> None:
        self._cache = cache
        self._measure_attention = ops.function("measure_attention", cache.device, cache.pages.layout)

    def forget(self, row: int) -> None:
        self.table.forget(row)

    def accumulate(self, readings: Sequence[Reading]) -> None:
        ending = [reading for reading in readings if reading.request.needs & Need.SEGMENTS]
        for options in dict.fromkeys(reading.request.policy.segment_options for reading in ending):
            same = [reading for reading in ending if reading.request.policy.segment_options == options]
            for part in in_parts(same, self._cache.room):
                self._add_segments(part, options)

    def _add_segments(self, readings: Sequence[Reading], options: SegmentOptions) -> None:
        """Record the sparsity of the newest queries' attention for the segments that end here."""
        cache, num_layers = self._cache, len(self._cache.layers)
        layer_numbers = self._ranks.layer_numbers(num_layers)
        chosen = [i for i, number in enumerate(layer_numbers) if not options.layers or number in options.layers]
        # Sparsity of each layer and head and whether it counts, both averaged over ranks, so that all record the same.
        found = torch.zeros(len(readings), num_layers, cache.sidecar.shape[2], 2, device=cache.device)
        if chosen:
            # A slice, because an index would be copied from the host.
            layers = slice(chosen[0], chosen[-1] + 1)
            counts = to_device([i in chosen for i in range(num_layers)[layers]], torch.float32, cache.device)
            found[:, layers, :, 0] = self._sparsity(readings, options, layers) * counts[:, None]
            found[:, layers, :, 1] = counts[:, None]
        mean = self._ranks.mean(found)
        numbers = [(order.num_logical - request.protected) // options.length - 1 for order, request in readings]
        self.table.add([request.row for _, request in readings], numbers, mean[:, 0] / mean[:, 1])

    def _sparsity(self, readings: Sequence[Reading], options: SegmentOptions, layers: slice) -> Tensor:
        """Return the share of negligible attention weights in some layers, float32 `[R, layers, H]`."""
        cache, orders = self._cache, [order for order, _ in readings]
        numbers = [
            (o.num_resident, o.num_queries, o.num_logical - 1, r.num_placed, o.num_logical - o.num_resident)
            for o, r in readings
        ]
        columns = to_device(np.array(numbers, dtype=np.int32).T.copy(), torch.int32, cache.device)
        resident, num_queries, newest, num_placed, num_evicted = columns.unbind()
        table = cache.table([order.blocks for order in orders])
        longest, most = max(order.num_resident for order in orders), max(order.num_queries for order in orders)
        positions = cache.positions(table, longest, num_placed, num_evicted)[:, layers]
        rows, lengths = [request.row for _, request in readings], [order.num_logical for order in orders]
        queries = cache.scale_queries(self._ring.newest(rows, lengths, most))[:, layers]
        caches, pointers, layout = cache.pages
        pages = PagedCache(caches[layers], pointers[layers], layout)
        share = self._measure_attention(
            # Weights are compared with the largest of a token, whatever a sink takes.
            *(*pages, table, positions, resident, queries, num_queries, newest, None),
            int(ops.Effect.NEGLIGIBLE),
            options.negligible,
        )
        found: Tensor = share.sum(dim=-1) / num_queries.view(-1, 1, 1)
        return found

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        """Set the segments, once the method has updated the number that it keeps of each."""
        if not batch.needs & Need.SEGMENTS:
            return
        length, device = batch.policy.segment_options.length, self._cache.device
        numbers = [
            (order.num_logical - self._window - request.protected, order.num_keep - request.protected - self._window)
            for order, request in batch.jobs
        ]
        rows, counts = [request.row for _, request in batch.jobs], [ceil_div(written, length) for written, _ in numbers]
        written, num_free = to_device(np.array(numbers, dtype=np.int64).T.copy(), torch.int64, device).unbind()
        first = length * torch.arange(max(counts), device=device)
        known = Segments(
            *self.table.read(rows, counts, device),
            sizes=(written[:, None] - first).clamp(0, length),
            num_free=num_free,
            longest=length,
        )
        memory = batch.policy.remember(known)
        self.table.remember(rows, counts, memory)
        inputs.segments = dataclasses.replace(known, memory=memory)


class _Column(NamedTuple):
    """A number of each segment.

    Attributes:
        values: `[rows, S]`.
        counts: how many segments of each row have one.
    """

    values: Tensor
    counts: dict[int, int]


class SegmentTable:
    """By row: the sparsity of each segment's attention, and a number that the method keeps of the segment.

    Both grow with the rows and the segments that there are, which take 12 bytes each.
    """

    def __init__(self) -> None:
        self._sparsity = _Column(torch.empty(0, 0), {})
        self._memory = _Column(torch.empty(0, 0, dtype=torch.int64), {})

    def forget(self, row: int) -> None:
        """Drop the segments of a row."""
        self._sparsity.counts.pop(row, None)
        self._memory.counts.pop(row, None)

    def add(self, rows: Sequence[int], numbers: Sequence[int], sparsity: Tensor) -> None:
        """Add a finished segment of each of R rows with its sparsity, float32 `[R]`. Segments come in order."""
        counts = self._sparsity.counts
        for row, number in zip(rows, numbers, strict=True):
            known = counts.get(row, 0)
            assert number == known, f"segment {number} follows {known} others"
            counts[row] = known + 1
        self._sparsity = _sized(self._sparsity, max(rows) + 1, max(numbers) + 1, sparsity.device)
        at = to_device(np.array([rows, numbers]), torch.int64, sparsity.device)
        self._sparsity.values[at[0], at[1]] = sparsity

    def read(self, rows: Sequence[int], counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return sparsity, float32, and memory, int64, of the first segments of R rows; `UNSEEN` and 0 if unknown.

        Args:
            rows: the rows.
            counts: how many segments of each.
            device: where the model runs.

        Returns:
            `[R, S]` each, S the largest count.
        """
        most = max(counts)
        self._sparsity = _sized(self._sparsity, max(rows) + 1, most, device)
        self._memory = _sized(self._memory, max(rows) + 1, most, device)
        known = [[min(c.counts.get(row, 0), n) for row, n in zip(rows, counts, strict=True)] for c in self._columns()]
        numbers = to_device(np.array([rows, *known]), torch.int64, device)
        is_known = torch.arange(most, device=device) < numbers[1:, :, None]
        sparsity, memory = (column.values[numbers[0], :most] for column in self._columns())
        return sparsity.where(is_known[0], UNSEEN), memory.where(is_known[1], 0)

    def remember(self, rows: Sequence[int], counts: Sequence[int], memory: Tensor) -> None:
        """Keep a number of each segment for the method, int64 `[R, S]`, of which each row has so many."""
        self._memory = _sized(self._memory, max(rows) + 1, memory.shape[1], memory.device)
        self._memory.values[to_device(rows, torch.int64, memory.device), : memory.shape[1]] = memory
        self._memory.counts.update(zip(rows, counts, strict=True))

    def _columns(self) -> tuple[_Column, _Column]:
        return self._sparsity, self._memory


def _sized(column: _Column, num_rows: int, num_segments: int, device: torch.device) -> _Column:
    """Return a column with room for so many rows and segments."""
    rows, segments = column.values.shape
    if num_rows <= rows and num_segments <= segments:
        return column
    more = (0, max(num_segments, 2 * segments) - segments, 0, max(num_rows, rows) - rows)
    return column._replace(values=F.pad(column.values.to(device), more))
