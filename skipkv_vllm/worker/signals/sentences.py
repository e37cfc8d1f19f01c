"""Sentences: which ones later text repeats, and which sentence each token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.needs import REPEATS, Need
from ...core.orders import Started
from ..compaction_batch import CompactionBatch
from ..ranks import ALONE, Ranks
from ..requests import ManagedRequest
from .base import ForwardOutput, Inputs, Signal, Step
from .sentence_tracker import SentenceTracker, TrackedTokens, look_up


class Sentences(Signal):
    """The sentences of running requests; in a pipeline only the last stage finds them and tells the others.

    Args:
        tracker: finds and compares sentences; None on other stages than the last.
        ranks: this worker's place among those that share the model.
    """

    def __init__(self, tracker: SentenceTracker | None, ranks: Ranks = ALONE) -> None:
        self.tracker = tracker
        self._ranks = ranks
        self._shared: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.tracker is None else self.tracker.nbytes

    def start(self, request: ManagedRequest, order: Started) -> None:
        if self.tracker is not None:
            self.tracker.reset(request.row, order.first_tracked)

    def after_forward(self, step: Step, output: ForwardOutput) -> None:
        if self.tracker is None:
            return
        assert output.hidden is not None
        tracked = step.rows.tracked
        if output.num_rejected is None:
            spans, num_tokens = tracked.of(step.batch)
        else:
            spans, num_tokens = tracked.accepted(step.batch, output.num_rejected)
            if num_tokens and self.tracker.needs_number:
                num_tokens = int(spans[2].sum())
        if num_tokens:
            self.tracker.update(TrackedTokens(output.token_ids, spans, num_tokens, output.hidden))

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        self._shared = None
        if self._ranks.num_stages > 1 and batch.needs & (REPEATS | Need.SENTENCES):
            self._shared = self._ranks.from_last_stage(self._by_position(batch))
        if not batch.policy.needs & REPEATS:
            return
        if self._shared is not None:
            inputs.penalties = look_up(self._shared[0], batch.positions)
        else:
            assert self.tracker is not None
            inputs.penalties = self.tracker.penalties(batch.rows, batch.positions, batch.num_logical, batch.longest)

    def numbers(self, batch: CompactionBatch, r: int, positions: Tensor) -> Tensor:
        """Return the sentence numbers, int64, of positions of one request of the batch that was read last."""
        if self._shared is not None:
            return self._shared[1, r, positions.long()].long()
        assert self.tracker is not None
        return self.tracker.state(batch.jobs[r].request.row).sentence_of(positions)

    def numbers_from(self, rows: Tensor, first: Tensor, number: int) -> Tensor:
        """Return the sentence numbers of `number` positions from `first` on, of R requests, int64 `[R, number]`.

        Args:
            rows: int64 `[R]`, rows of the requests.
            first: int32 `[R]`.
            number: how many positions; behind the last token they belong to the open sentence.
        """
        if self.tracker is None:
            numbers = torch.empty(len(rows), number, dtype=torch.int64, device=rows.device)
        else:
            order = torch.arange(number, dtype=torch.int32, device=rows.device)
            numbers = self.tracker.sentences_of(rows, first[:, None] + order)
        return self._ranks.from_last_stage(numbers) if self._ranks.num_stages > 1 else numbers

    def _by_position(self, batch: CompactionBatch) -> Tensor:
        """Return penalty and sentence number of every logical position, float32 `[2, R, longest]`.

        The last stage fills in what it knows; the others return room for it.
        """
        found = torch.zeros(2, len(batch.jobs), batch.longest, dtype=torch.float32, device=batch.rows.device)
        if self.tracker is not None:
            order = torch.arange(batch.longest, dtype=torch.int32, device=found.device)
            every = order.expand(len(batch.jobs), -1)
            of_penalties = self.tracker.penalties(batch.rows, every[:, None, None], batch.num_logical, batch.longest)
            found[0] = of_penalties[:, 0, 0]
            found[1] = self.tracker.sentences_of(batch.rows.long(), every)
        return found

    def similar_pairs(self, row: int) -> tuple[Tensor, Tensor] | None:
        """Return the repeated sentences of a request for its trace; None if sentences are not compared here."""
        if self.tracker is None or not self.tracker.compares:
            return None
        return self.tracker.similar_pairs(row)
