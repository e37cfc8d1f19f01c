"""The running batch of a step, and what follows from the rows of its requests.

Most steps decode one token of the same requests as the step before. So what follows from the requests alone is computed
once and kept until a request comes, goes or is compacted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.device import to_device

NEVER = np.iinfo(np.int64).max
"""First tracked position of a request whose sentences are not tracked."""


class StepBatch(NamedTuple):
    """The R requests of a step in batch order, their tokens contiguous.

    Attributes:
        request_ids: R ids.
        counts: integer `[R]`, tokens of each request in this step, at least one.
        starts: integer `[R]`, logical position of each one's first token. With speculative decoding that of a request
            with drafts in flight may be too large, because some of them may have been rejected.
        num_tokens: sum of the counts.
        positions: integer `[>= T]` on the device, logical position of each token, with speculative decoding; else None.
    """

    request_ids: list[str]
    counts: np.ndarray
    starts: np.ndarray
    num_tokens: int
    positions: Tensor | None = None


class Evicted(NamedTuple):
    """Tokens that each request of a batch has evicted, int32 `[R]`; the same object as long as nothing changes."""

    host: np.ndarray
    device: Tensor


class RowSpans:
    """Spans of the tokens of K requests in a batch, each from the request's first position on.

    Args:
        places: int64 `[K]`, places of the requests in the batch, ascending.
        rows: int64 `[K]`, their rows.
        firsts: int64 `[K]`, their first positions.
        device: where the model runs.
    """

    def __init__(self, places: np.ndarray, rows: np.ndarray, firsts: np.ndarray, device: torch.device) -> None:
        self.places, self._firsts, self._device = places, firsts, device
        # Spans of a step that only decodes: all but the positions stay the same.
        self._spans = np.ones((4, len(places)), dtype=np.int64)
        self._spans[0], self._spans[1] = rows, places
        self._positions = self._spans[3]
        self._on_host = torch.from_numpy(self._spans) if device.type == "cpu" else None
        self._have_begun = False

    def of(self, batch: StepBatch) -> tuple[Tensor, int]:
        """Return the spans of a step and how many tokens they have.

        The spans are int64 `[4, <= K]` on the device: row, first token in the step, number of tokens, position of the
        first token.
        """
        number = len(self.places)
        if batch.num_tokens > len(batch.request_ids) or batch.positions is not None:
            return self._mixed(batch)
        starts = batch.starts if number == len(batch.starts) else batch.starts[self.places]
        if not self._have_begun:
            # Once every request is past its first position it stays so.
            self._have_begun = bool((starts >= self._firsts).all())
            if not self._have_begun:
                return self._mixed(batch)
        self._positions[:] = starts
        return self._to_device(self._spans) if self._on_host is None else self._on_host, number

    def _mixed(self, batch: StepBatch, num_rejected: Tensor | None = None) -> tuple[Tensor, int]:
        starts, counts, places = batch.starts[self.places], batch.counts[self.places], self.places
        # np.clip takes several times as long for the few requests of a step.
        skipped = np.minimum(np.maximum(self._firsts - starts, 0), counts)
        fresh, ends = counts - skipped, batch.counts.cumsum()[places]
        spans = np.array([self._spans[0], ends - fresh, fresh, starts + skipped], dtype=np.int64)
        if not fresh.all():
            spans, places = spans[:, fresh > 0], places[fresh > 0]
        found = self._to_device(spans)
        if batch.positions is not None and spans.size:
            found[3] = batch.positions[found[1]]
            if num_rejected is not None:
                found[2] -= num_rejected[self._to_device(places)]
        return found, int(fresh.sum())

    def accepted(self, batch: StepBatch, num_rejected: Tensor) -> tuple[Tensor, int]:
        """Return the same without the drafts that were rejected, and at least as many tokens as that.

        Args:
            batch: the step, with drafts.
            num_rejected: integer `[R]` on the device, the last tokens of each request.
        """
        return self._mixed(batch, num_rejected)

    def _to_device(self, spans: np.ndarray) -> Tensor:
        return to_device(spans, torch.int64, self._device)


class RowTable:
    """What the forward pass needs of each row, on the host; the last entry is for unmanaged requests.

    Args:
        number: requests that can run at once.

    Attributes:
        unmanaged: index of the last entry.
        num_evicted: int32, tokens evicted so far.
        is_recorded: bool, whether the request's queries are recorded.
        first_tracked: int64, position from which its sentences are tracked, or `NEVER`.
    """

    def __init__(self, number: int) -> None:
        self.unmanaged = number
        self.num_evicted = np.zeros(number + 1, dtype=np.int32)
        self.is_recorded = np.zeros(number + 1, dtype=bool)
        self.first_tracked = np.full(number + 1, NEVER, dtype=np.int64)


class BatchRows:
    """Data derived from the rows of a batch's requests.

    Args:
        request_ids: R ids in batch order.
        rows: int64 `[R]`, the row of each request, or that of unmanaged ones.
        table: what is known of the rows.
        device: where the model runs.

    Attributes:
        request_ids: see above.
        recorded: int64 `[R]`, the rows, or -1 where queries are not recorded.
        evicted: tokens that the requests have evicted; None if none has evicted any.
        tracked: spans of the requests whose sentences are tracked.
    """

    def __init__(self, request_ids: Sequence[str], rows: np.ndarray, table: RowTable, device: torch.device) -> None:
        self.request_ids, self._rows, self._table, self._device = request_ids, rows, table, device
        self.recorded = np.where(table.is_recorded[rows], rows, -1)
        self.update_evicted()
        first_tracked = table.first_tracked[rows]
        tracked = np.flatnonzero(first_tracked < NEVER)
        self.tracked = RowSpans(tracked, rows[tracked], first_tracked[tracked], device)

    def update_evicted(self) -> None:
        """Refresh how many tokens each request has evicted."""
        evicted = self._table.num_evicted[self._rows]
        on_device = to_device(evicted, torch.int32, self._device) if evicted.any() else None
        self.evicted = None if on_device is None else Evicted(evicted, on_device)
