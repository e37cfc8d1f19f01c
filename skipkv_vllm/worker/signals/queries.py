"""The query ring: the newest post-RoPE queries of every running request, in every layer.

One indexed copy per layer into a persistent buffer, inside the attention call. It is safe in CUDA graphs, because the
index is a persistent buffer too and is refilled before each step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...core.device import to_device
from ...ops.functional import dequantised
from ..compaction_batch import CompactionBatch, reads_queries
from .base import Inputs, Signal, Step


class QueryRing(Signal):
    """Ring buffer `[layers, rows * n + 1, Hq, D]`; position p of row r lies in entry `r * n + p % n`.

    The number n of queries kept is the window W, or more for methods that add up attention. The last entry is the
    discard row's: padding, older tokens of a long chunk, unmanaged requests.

    Args:
        num_layers: attention layers of this worker.
        num_rows: requests that can run at once.
        window: W, number of queries that score the held tokens.
        num_kept: n, at least W.
        num_heads: query heads of this worker.
        head_size: elements of a query that is recorded.
        max_tokens: tokens of the largest step.
        dtype: of the stored queries.
        device: where the model runs.
        logit_scales: factor of the products of queries and keys in each layer; by default 1 / sqrt(D), which operators
            assume.
        key_size: elements of a key, if not those of a query that is recorded.

    Attributes:
        num_kept, num_heads: see above.
        record: the operator that copies queries into the ring.
        recording: False in a step whose queries are not needed; a captured graph then records into the discard row.
        index: int64 `[max_tokens]`, entry of each token of the step.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        window: int,
        num_kept: int,
        num_heads: int,
        head_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        logit_scales: Sequence[float] | None = None,
        key_size: int | None = None,
    ) -> None:
        self.num_kept, self.num_heads = num_kept, num_heads
        self._window = window
        self._discard = num_rows * num_kept
        self._entries = torch.zeros(num_layers, self._discard + 1, num_heads, head_size, dtype=dtype, device=device)
        factors = [scale * (key_size or head_size) ** 0.5 for scale in logit_scales or ()]
        self._factors: Tensor | None = None
        if any(abs(factor - 1) > 1e-6 for factor in factors):
            self._factors = torch.tensor(factors, dtype=dtype, device=device)[:, None, None, None]
        self._first_of_layer = np.arange(num_layers) * (self._discard + 1)
        self.record = ops.function("record_queries", device)
        self.recording = True
        self.index = torch.full((max_tokens,), self._discard, dtype=torch.int64, device=device)
        # For the few numbers of a step NumPy takes a fraction of PyTorch's time.
        self._index_on_host = self.index.numpy() if self.index.device.type == "cpu" else None
        self._num_set = 0
        """first tokens of the index that may name an entry; the others name the discard row's"""
        # Cached from the previous batch, which usually has not changed: first entry and number of entries by request.
        self._rows: np.ndarray | None = None
        self._first_entry = self._cycle = np.zeros(0, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes + self.index.nbytes

    def attach(self, layer_index: int, impl: Any) -> None:
        """Make an attention implementation of vLLM write its queries into the ring.

        The object's class is replaced by a subclass, so this works for every backend and inside graphs.
        """
        self._hook(layer_index, impl, _recording(type(impl)))  # type: ignore[arg-type]

    def _hook(self, layer_index: int, attention: Any, recording: type) -> None:
        attention.__class__ = recording
        attention._skipkv_ring = self
        attention._skipkv_entries = self._entries[layer_index]

    def prepare(self, step: Step) -> None:
        batch = step.batch
        if not step.records_queries:
            self.skip()
        elif batch.positions is None:
            self.place(step.rows.recorded, batch.counts, batch.starts, batch.num_tokens)
        else:
            self.place_at(step.rows.recorded, batch.counts, batch.positions[: batch.num_tokens])

    def place(self, rows: np.ndarray, counts: np.ndarray, starts: np.ndarray, num_tokens: int) -> None:
        """Choose where the queries of the coming step go; R requests, their tokens contiguous.

        Args:
            rows: int64 `[R]`, -1 for a request whose queries are not recorded; never changed afterwards.
            counts: integer `[R]`, tokens of each request in this step, at least one.
            starts: integer `[R]`, logical position of each one's first token.
            num_tokens: sum of the counts.
        """
        self._set_rows(rows)
        if num_tokens == len(rows):
            entries = self._first_entry + starts % self._cycle
        else:
            offsets, first_entry, cycle = self._by_token(counts, num_tokens)
            entries = first_entry + (np.repeat(starts, counts) + offsets) % cycle
        self._begin(num_tokens)
        if self._index_on_host is None:
            self.index[:num_tokens].copy_(to_device(entries, torch.int64, self.index.device), non_blocking=True)
        else:
            self._index_on_host[:num_tokens] = entries

    def place_at(self, rows: np.ndarray, counts: np.ndarray, positions: Tensor) -> None:
        """Do the same where only the device knows which drafts were accepted, and so where each request's tokens begin.

        A draft takes the entry of its position, which the right token takes over if it is rejected.

        Args:
            rows, counts: see `place`.
            positions: integer `[T]` on the device, logical positions of the tokens.
        """
        self._set_rows(rows)
        num_tokens = len(positions)
        _, *numbers = self._by_token(counts, num_tokens)
        first_entry, cycle = to_device(np.array(numbers), torch.int64, self.index.device)
        self._begin(num_tokens)
        torch.remainder(positions, cycle, out=self.index[:num_tokens]).add_(first_entry)

    def _set_rows(self, rows: np.ndarray) -> None:
        if rows is not self._rows:
            self._rows, is_recorded = rows, rows >= 0
            self._first_entry = np.where(is_recorded, rows * self.num_kept, self._discard)
            self._cycle = np.where(is_recorded, self.num_kept, 1)

    def _by_token(self, counts: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each token's place in its request's part of the step, and its first entry and number of entries.

        All but the last `num_kept` tokens of a request have the discard row's.
        """
        offsets = np.arange(num_tokens) - np.repeat(counts.cumsum() - counts, counts)
        count, first, cycle = (np.repeat(x, counts) for x in (counts, self._first_entry, self._cycle))
        is_new = offsets >= count - self.num_kept
        return offsets, np.where(is_new, first, self._discard), np.where(is_new, cycle, 1)

    def _begin(self, num_tokens: int) -> None:
        if num_tokens < self._num_set:
            self.index[num_tokens : self._num_set].fill_(self._discard)
        self._num_set = num_tokens
        self.recording = True

    def skip(self) -> None:
        """Record no query of the coming step."""
        if self.recording:
            self._clear()
            self.recording = False

    def prepare_dummy(self) -> None:
        # A graph may be captured, so it records, into the discard row.
        self._clear()
        self.recording = True

    @contextmanager
    def handing_out(self) -> Iterator[list[Tensor]]:
        """Collect the queries of an eager forward pass, `[T, Hq, D]` by layer, instead of recording them."""
        seen: list[Tensor] = []

        def hand_out(query: Tensor, _index: Tensor, entries: Tensor, scale: Tensor | None) -> None:
            seen.append(query.clone() if scale is None else dequantised(query, scale).to(entries.dtype))

        record, recording = self.record, self.recording
        self.record, self.recording = hand_out, True
        try:
            yield seen
        finally:
            self.record, self.recording = record, recording

    def _clear(self) -> None:
        self.index[: self._num_set].fill_(self._discard)
        self._num_set = 0

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        if reads_queries(batch.policy):
            rows, lengths = zip(*((request.row, order.num_logical) for order, request in batch.jobs), strict=True)
            inputs.queries = self.newest(rows, lengths, self._window)

    def of_layer(self, layer_index: int, row: int, num_logical: int, count: int) -> Tensor:
        """Return the queries of the last `count` tokens before position `num_logical`: `[count, Hq, D]`."""
        entries = self._entries[layer_index, row * self.num_kept : (row + 1) * self.num_kept]
        return entries.roll(-(num_logical % self.num_kept), dims=0)[self.num_kept - count :]

    def newest(self, rows: Sequence[int], num_logical: Sequence[int], count: int) -> Tensor:
        """Return the same of R requests and all layers, oldest first: `[R, layers, count, Hq, D]`.

        They are scaled so that 1 / sqrt(D) is the factor of their products with keys, whatever a layer's own is.
        """
        if len(rows) == 1:
            # One request's entries lie together: a copy of a slice takes a fraction of the time.
            own = self._entries[:, rows[0] * self.num_kept : (rows[0] + 1) * self.num_kept]
            newest = own.roll(-(num_logical[0] % self.num_kept), dims=1)[None, :, self.num_kept - count :]
            return self.scaled(newest).contiguous()
        first = np.array(rows)[:, None] * self.num_kept
        entries = first + (np.array(num_logical)[:, None] - count + np.arange(count)) % self.num_kept
        of_layers = self._first_of_layer[:, None] + entries[:, None]
        chosen = to_device(of_layers.ravel(), torch.int64, self._entries.device)
        found = self._entries.flatten(0, 1).index_select(0, chosen)
        return self.scaled(found.view(*of_layers.shape, *found.shape[1:]))

    def scaled(self, queries: Tensor) -> Tensor:
        """Scale queries `[R, layers, n, Hq, D]` as `newest` does."""
        return queries if self._factors is None else queries * self._factors


@functools.cache
def _recording(cls: type) -> type:
    """Return the subclass of an attention implementation that records queries; one per class.

    It adds no instance layout of its own, because an object can only change to a class of the same memory layout.
    """

    def forward(self: Any, layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        ring = self._skipkv_ring
        if ring.recording:
            entries = self._skipkv_entries
            # vLLM has quantised the queries for an attention kernel that reads 8 bits.
            scale = None if query.dtype is entries.dtype else layer._q_scale
            ring.record(query, ring.index, entries, scale)
        return cls.forward(self, layer, query, *args, **kwargs)  # type: ignore[attr-defined]

    return type(f"Recording{cls.__name__}", (cls,), {"forward": forward, "__slots__": ()})
