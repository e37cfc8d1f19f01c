"""The observation-query ring: the newest post-RoPE queries of every running request, in every layer.

One indexed copy per layer into a persistent buffer, inside the attention call. It is safe in CUDA graphs:
the index is a persistent buffer too, refilled before each step.
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


class QueryRing:
    """Ring buffer `[layers, slots * n + 1, Hq, D]`; position p of slot s lies in row `s * n + p % n`.

    The number n of queries kept is the window W, or more for methods that add up attention. The last row
    is for what nobody reads: padding, older tokens of a long chunk, unmanaged requests.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kept: int,
        num_heads: int,
        head_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_kept = num_kept
        self._nobody = num_slots * num_kept
        self._rows = torch.zeros(num_layers, self._nobody + 1, num_heads, head_size, dtype=dtype, device=device)
        self._first_of_layer = np.arange(num_layers) * (self._nobody + 1)
        self.observe = ops.function("observe_queries", device)
        self.recording = True
        """False in a step whose queries nobody needs; a captured graph records them all the same, for nobody"""
        self.index = torch.full((max_tokens,), self._nobody, dtype=torch.int64, device=device)
        # For the few numbers of a step NumPy takes a fraction of PyTorch's time.
        self._index_on_host = self.index.numpy() if self.index.device.type == "cpu" else None
        self._num_set = 0
        """leading entries of the index that may name a row; the others name nobody's"""
        # Of the batch before, because most batches are the one before: first row and number of rows by request.
        self._slots: np.ndarray | None = None
        self._first_row = self._cycle = np.zeros(0, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Device memory of the ring."""
        return self._rows.nbytes + self.index.nbytes

    def attach(self, layer_index: int, impl: Any) -> None:
        """Make an attention implementation of vLLM write its queries into the ring.

        The object's class is replaced by a subclass, so this works for every backend and inside graphs.
        """
        impl.__class__ = _observing(type(impl))  # type: ignore[arg-type]
        impl._skipkv_ring = self
        impl._skipkv_rows = self._rows[layer_index]

    def prepare(self, slots: np.ndarray, counts: np.ndarray, starts: np.ndarray, num_tokens: int) -> None:
        """Say where the queries of the coming step go. R requests, their tokens contiguous.

        Args:
            slots: int64 `[R]`, -1 for a request that is not observed; never changed afterwards.
            counts: integer `[R]` tokens of each request in this step, at least one.
            starts: integer `[R]` logical position of each one's first token.
            num_tokens: sum of the counts.
        """
        if slots is not self._slots:
            self._slots, observed = slots, slots >= 0
            self._first_row = np.where(observed, slots * self.num_kept, self._nobody)
            self._cycle = np.where(observed, self.num_kept, 1)
        if num_tokens == len(slots):
            rows = self._first_row + starts % self._cycle
        else:
            offsets = np.arange(num_tokens) - np.repeat(counts.cumsum() - counts, counts)
            start, count, first, cycle = (np.repeat(x, counts) for x in (starts, counts, self._first_row, self._cycle))
            rows = np.where(offsets >= count - self.num_kept, first + (start + offsets) % cycle, self._nobody)
        if num_tokens < self._num_set:
            self.index[num_tokens : self._num_set].fill_(self._nobody)
        self._num_set = num_tokens
        if self._index_on_host is None:
            self.index[:num_tokens].copy_(to_device(rows, torch.int64, self.index.device), non_blocking=True)
        else:
            self._index_on_host[:num_tokens] = rows
        self.recording = True

    def skip(self) -> None:
        """Nobody needs the queries of the coming step."""
        if self.recording:
            self._clear()
            self.recording = False

    def idle(self) -> None:
        """The coming forward pass is a dummy: what it records is for nobody, but a graph may be captured in it."""
        self._clear()
        self.recording = True

    @contextmanager
    def handing_out(self) -> Iterator[list[Tensor]]:
        """Collect the queries of an eager forward pass, `[T, Hq, D]` by layer, instead of recording them."""
        seen: list[Tensor] = []
        observe, recording = self.observe, self.recording
        self.observe, self.recording = lambda query, index, rows: seen.append(query.clone()), True
        try:
            yield seen
        finally:
            self.observe, self.recording = observe, recording

    def _clear(self) -> None:
        self.index[: self._num_set].fill_(self._nobody)
        self._num_set = 0

    def read(self, layer_index: int, slot: int, num_logical: int, count: int) -> Tensor:
        """Queries of the last `count` tokens before position `num_logical`, oldest first: `[count, Hq, D]`."""
        rows = self._rows[layer_index, slot * self.num_kept : (slot + 1) * self.num_kept]
        return rows.roll(-(num_logical % self.num_kept), dims=0)[self.num_kept - count :]

    def read_all(self, slots: Sequence[int], num_logical: Sequence[int], count: int) -> Tensor:
        """The same for R requests and all layers: `[R, layers, count, Hq, D]`."""
        if len(slots) == 1:
            # One request's rows lie together: a copy of a slice takes a fraction of the time.
            own = self._rows[:, slots[0] * self.num_kept : (slots[0] + 1) * self.num_kept]
            return own.roll(-(num_logical[0] % self.num_kept), dims=1)[None, :, self.num_kept - count :].contiguous()
        first = np.array(slots)[:, None] * self.num_kept
        rows = first + (np.array(num_logical)[:, None] - count + np.arange(count)) % self.num_kept
        of_layers = self._first_of_layer[:, None] + rows[:, None]
        found = self._rows.flatten(0, 1).index_select(0, to_device(of_layers.ravel(), torch.int64, self._rows.device))
        return found.view(*of_layers.shape, *found.shape[1:])


def _dequantised(query: Tensor, scale: Tensor) -> Tensor:
    """What vLLM quantised for an attention kernel that multiplies 8-bit queries with 8-bit keys; float32.

    Args:
        query: `[T, Hq, D]`.
        scale: one number, or one for each group of query heads.
    """
    by_head = scale.flatten().repeat_interleave(query.shape[1] // scale.numel())
    return query.float() * by_head[:, None]


@functools.cache
def _observing(cls: type) -> type:
    """The subclass of an attention implementation that records queries; one per class.

    It adds no instance attributes of its own kind, because an object can only change to a class of the
    same memory layout.
    """

    def forward(self: Any, layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        ring = self._skipkv_ring
        if ring.recording:
            rows = self._skipkv_rows
            seen = query if query.dtype is rows.dtype else _dequantised(query, layer._q_scale).to(rows.dtype)
            ring.observe(seen, ring.index, rows)
        return cls.forward(self, layer, query, *args, **kwargs)  # type: ignore[attr-defined]

    return type(f"Observing{cls.__name__}", (cls,), {"forward": forward, "__slots__": ()})
