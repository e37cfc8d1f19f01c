"""Segments of fixed length and the sparsity of their attention, for methods that treat a stretch of text as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...core.limits import ceil_div
from ...core.needs import Need
from ...policies.base import Segments
from ..cache import KVCache
from ..compaction_batch import CompactionBatch
from ..ranks import Ranks
from ..requests import Job, Reading
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

    def forget(self, row: int) -> None:
        self.table.forget(row)

    def accumulate(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            if reading.request.needs & Need.SEGMENTS:
                self._add_segment(reading)

    def _add_segment(self, reading: Reading) -> None:
        """Record the sparsity of the newest queries' attention for the segment that ends here."""
        (order, request), cache = reading, self._cache
        options, num_evicted = request.policy.segment_options, order.num_logical - order.num_resident
        positions = cache.positions_of(order.blocks, order.num_resident, request.num_placed, num_evicted)
        pages = cache.table([order.blocks])[0].long()
        # Sparsity of each layer and head and whether it counts, both averaged over ranks, so that all record the same.
        found = []
        for i in range(len(cache.layers)):
            queries = self._ring.of_layer(i, request.row, order.num_logical, order.num_queries)
            keys = cache.keys(i, pages, order.num_resident)
            sparsity = ops.attention_sparsity(queries, keys, positions[i], negligible=options.negligible)
            counts = not options.layers or self._ranks.first_layer + i in options.layers
            found.append(torch.stack([sparsity, torch.ones_like(sparsity)], dim=-1) * counts)
        mean = self._ranks.mean(torch.stack(found)[None])[0]
        number = (order.num_logical - request.protected) // options.length - 1
        self.table.add(request.row, number, mean[0] / mean[1])

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        if batch.needs & Need.SEGMENTS:
            inputs.segments = [self._segments(job) for job in batch.jobs]

    def _segments(self, job: Job) -> Segments:
        """Return the segments of a request, once its method has updated the number that it keeps of each."""
        order, request = job
        length, written = request.policy.segment_options.length, order.num_logical - self._window - request.protected
        count = ceil_div(written, length)
        device = self._cache.device
        known = Segments(
            *self.table.read(request.row, count, device),
            sizes=(written - length * torch.arange(count, device=device)).clamp(max=length),
            num_free=order.num_keep - request.protected - self._window,
            longest=length,
        )
        memory = request.policy.remember(known)
        self.table.remember(request.row, memory)
        return dataclasses.replace(known, memory=memory)


class SegmentTable:
    """By row: the sparsity of each segment's attention, and a number that the method keeps of the segment."""

    def __init__(self) -> None:
        self._sparsity: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}

    def forget(self, row: int) -> None:
        """Drop the segments of a row."""
        self._sparsity.pop(row, None)
        self._memory.pop(row, None)

    def add(self, row: int, number: int, sparsity: Tensor) -> None:
        """Add a finished segment with its sparsity, a float32 scalar. Segments come in order."""
        known = self._sparsity.get(row)
        found = sparsity.view(1) if known is None else torch.cat([known, sparsity.view(1)])
        assert len(found) == number + 1, f"segment {number} follows {len(found) - 1} others"
        self._sparsity[row] = found

    def read(self, row: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return sparsity, float32, and memory, int64, of the first `count` segments; `UNSEEN` and 0 if unknown."""
        sparsity = self._sparsity.get(row, torch.empty(0, device=device))[:count]
        memory = self._memory.get(row, torch.empty(0, dtype=torch.int64, device=device))[:count]
        return F.pad(sparsity, (0, count - len(sparsity)), value=UNSEEN), F.pad(memory, (0, count - len(memory)))

    def remember(self, row: int, memory: Tensor) -> None:
        """Keep a number of each segment for the method, int64 `[S]`."""
        self._memory[row] = memory
