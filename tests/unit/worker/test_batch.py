"""Spans of a step's tokens, with drafts that may be rejected."""

from __future__ import annotations

import numpy as np
import torch

from skipkv_vllm.worker.batch import RowSpans, StepBatch

CPU = torch.device("cpu")


def batch(counts: list[int], starts: list[int], positions: list[int] | None = None) -> StepBatch:
    on_device = None if positions is None else torch.tensor(positions)
    names = [str(i) for i in range(len(counts))]
    return StepBatch(names, np.array(counts), np.array(starts), sum(counts), on_device)


def spans_of(places: list[int], rows: list[int], firsts: list[int]) -> RowSpans:
    return RowSpans(np.array(places), np.array(rows), np.array(firsts), CPU)


def test_positions_of_drafts_come_from_the_device():
    spans = spans_of([0, 2], [5, 3], [0, 0])
    # The scheduler counted two drafts of the last request that were rejected.
    step = batch([1, 2, 3], [9, 0, 22], [9, 0, 1, 20, 21, 22])
    found, number = spans.of(step)
    assert (found.tolist(), number) == ([[5, 3], [0, 3], [1, 3], [9, 20]], 4)


def test_rejected_drafts_are_left_out():
    spans = spans_of([0, 2], [5, 3], [0, 0])
    step = batch([1, 2, 3], [9, 0, 22], [9, 0, 1, 20, 21, 22])
    found, number = spans.accepted(step, torch.tensor([0, 0, 2]))
    assert found.tolist() == [[5, 3], [0, 3], [1, 1], [9, 20]]
    assert number >= 2


def test_a_request_that_is_not_tracked_yet_is_left_out():
    spans = spans_of([0, 1], [5, 3], [40, 2])
    step = batch([4, 3], [0, 1], [0, 1, 2, 3, 1, 2, 3])
    found, _ = spans.accepted(step, torch.tensor([0, 1]))
    assert found.tolist() == [[3], [5], [1], [2]]
