"""State of the running batch by row. Most steps decode one token of the same requests as the step before, so what
follows from the requests alone is computed once and kept until a request comes, goes or is compacted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.device import to_device

NEVER = np.iinfo(np.int64).max
"""First tracked position of a request whose sentences nobody reads."""


class StepBatch(NamedTuple):
    """The requests of a step in batch order, their tokens contiguous.

    Attributes:
        request_ids: R ids.
        counts: integer `[R]` tokens of each request in this step, at least one.
        starts: integer `[R]` logical position of each one's first token.
        num_tokens: sum of the counts.
    """

    request_ids: list[str]
    counts: np.ndarray
    starts: np.ndarray
    num_tokens: int


class Evicted(NamedTuple):
    """Tokens that each request of a batch has evicted, int32 `[R]`; the same object as long as nothing changes."""

    host: np.ndarray
    device: Tensor


class RowSpans:
    """Where the tokens of some requests of a batch lie, of each request from its first position on.

    Args:
        rows: int64 `[K]` rows of the requests in the batch, ascending.
        slots: int64 `[K]` their state slots.
        firsts: int64 `[K]` their first positions.
        device: where the model runs.
    """

    def __init__(self, rows: np.ndarray, slots: np.ndarray, firsts: np.ndarray, device: torch.device) -> None:
        self.rows, self._firsts, self._device = rows, firsts, device
        # Spans of a step that only decodes: all but the positions stay the same.
        self._spans = np.ones((4, len(rows)), dtype=np.int64)
        self._spans[0], self._spans[1] = slots, rows
        self._positions = self._spans[3]
        self._on_host = torch.from_numpy(self._spans) if device.type == "cpu" else None
        self._have_begun = False

    def of(self, batch: StepBatch) -> tuple[Tensor, int]:
        """The spans of a step: int64 `[4, <= K]` on the device (state slot, first token in the step, number of tokens,
        position of the first token), and how many tokens they have."""
        number = len(self.rows)
        if batch.num_tokens > len(batch.request_ids):
            return self._mixed(batch)
        starts = batch.starts if number == len(batch.starts) else batch.starts[self.rows]
        if not self._have_begun:
            # Once every request is past its first position it stays so.
            self._have_begun = bool((starts >= self._firsts).all())
            if not self._have_begun:
                return self._mixed(batch)
        self._positions[:] = starts
        return self._to_device(self._spans) if self._on_host is None else self._on_host, number

    def _mixed(self, batch: StepBatch) -> tuple[Tensor, int]:
        starts, counts = batch.starts[self.rows], batch.counts[self.rows]
        # np.clip takes several times as long for the few requests of a step.
        skipped = np.minimum(np.maximum(self._firsts - starts, 0), counts)
        fresh, ends = counts - skipped, batch.counts.cumsum()[self.rows]
        spans = np.array([self._spans[0], ends - fresh, fresh, starts + skipped], dtype=np.int64)
        if not fresh.all():
            spans = spans[:, fresh > 0]
        return self._to_device(spans), int(fresh.sum())

    def _to_device(self, spans: np.ndarray) -> Tensor:
        return to_device(spans, torch.int64, self._device)


class BatchRows:
    """What is known of the requests of a batch, by row.

    Args:
        request_ids: R ids in batch order.
        slots: int64 `[R]` state slots.
        evicted: int32 `[R]` tokens evicted so far.
        observed: bool `[R]`, whether somebody reads the request's queries.
        first_tracked: int64 `[R]` position from which its sentences are tracked, or `NEVER`.
        device: where the model runs.
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        slots: np.ndarray,
        evicted: np.ndarray,
        observed: np.ndarray,
        first_tracked: np.ndarray,
        device: torch.device,
    ) -> None:
        self.request_ids, self.slots, self._device = request_ids, slots, device
        self.observed_slots = np.where(observed, slots, -1)
        self.set_evicted(evicted)
        tracked = np.flatnonzero(first_tracked < NEVER)
        self.tracked = RowSpans(tracked, slots[tracked], first_tracked[tracked], device)

    def set_evicted(self, evicted: np.ndarray) -> None:
        """Note how many tokens each request has evicted, int32 `[R]`."""
        on_device = to_device(evicted, torch.int32, self._device) if evicted.any() else None
        self.evicted = None if on_device is None else Evicted(evicted, on_device)
