"""State of the running batch by row. Most steps decode one token of the same requests as the step before, so what
follows from the requests alone is computed once and kept until a request comes, goes or is compacted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.paging import to_device

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

    @property
    def only_decodes(self) -> bool:
        """Whether every request has one token."""
        return self.num_tokens == len(self.request_ids)


class Evicted(NamedTuple):
    """Tokens that each request of a batch has evicted, int32 `[R]`; the same object as long as nothing changes."""

    host: np.ndarray
    device: Tensor


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
        self.request_ids = request_ids
        self.observed_slots = np.where(observed, slots, -1)
        self.evicted: Evicted | None = None
        if evicted.any():
            self.evicted = Evicted(evicted, to_device(evicted, torch.int32, device))
        self._slots, self._first_tracked, self._device = slots, first_tracked, device
        self._tracked = np.flatnonzero(first_tracked < NEVER)
        self._all_tracked = len(self._tracked) == len(slots)
        self._begun = False
        # Spans of a step that only decodes: all but the positions stay the same.
        self._spans = np.ones((4, len(self._tracked)), dtype=np.int64)
        self._spans[0], self._spans[1] = slots[self._tracked], self._tracked
        self._shared_spans = torch.from_numpy(self._spans)

    def spans(self, batch: StepBatch) -> tuple[Tensor, int]:
        """The tokens of a step that belong to sentences: `TrackedTokens.spans` on the device, and their number."""
        if not batch.only_decodes or not self._has_begun(batch.starts):
            return self._mixed_spans(batch)
        self._spans[3] = batch.starts if self._all_tracked else batch.starts[self._tracked]
        on_device = self._shared_spans if self._device.type == "cpu" else self._to_device(self._spans)
        return on_device, self._spans.shape[1]

    def _has_begun(self, starts: np.ndarray) -> bool:
        """Whether every tracked request is past its first tracked position, which then stays so."""
        if not self._begun:
            self._begun = bool((starts >= self._first_tracked)[self._tracked].all())
        return self._begun

    def _mixed_spans(self, batch: StepBatch) -> tuple[Tensor, int]:
        # np.clip takes several times as long for the few requests of a step.
        skipped = np.minimum(np.maximum(self._first_tracked - batch.starts, 0), batch.counts)
        fresh = batch.counts - skipped
        spans = np.array([self._slots, batch.counts.cumsum() - fresh, fresh, batch.starts + skipped], dtype=np.int64)
        if not fresh.all():
            spans = spans[:, fresh > 0]
        return self._to_device(spans), int(fresh.sum())

    def _to_device(self, spans: np.ndarray) -> Tensor:
        return to_device(spans, torch.int64, self._device)
