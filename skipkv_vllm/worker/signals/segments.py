"""What is known of the segments of running requests, for methods that treat stretches of text alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNSEEN = -1.0
"""Sparsity of a segment that is still being written."""


class SegmentTable:
    """By state slot: the sparsity of each segment's attention, and a number that the method keeps of it."""

    def __init__(self) -> None:
        self._sparsity: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}

    def forget(self, slot: int) -> None:
        """The request in this state slot ended or starts over."""
        self._sparsity.pop(slot, None)
        self._memory.pop(slot, None)

    def note(self, slot: int, number: int, sparsity: Tensor) -> None:
        """A segment is written; its sparsity is a float32 scalar. Segments come in order."""
        known = self._sparsity.get(slot)
        found = sparsity.view(1) if known is None else torch.cat([known, sparsity.view(1)])
        assert len(found) == number + 1, f"segment {number} follows {len(found) - 1} others"
        self._sparsity[slot] = found

    def read(self, slot: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sparsity, float32, and memory, int64, of the first `count` segments; `UNSEEN` and 0 where there is none."""
        sparsity = self._sparsity.get(slot, torch.empty(0, device=device))[:count]
        memory = self._memory.get(slot, torch.empty(0, dtype=torch.int64, device=device))[:count]
        return F.pad(sparsity, (0, count - len(sparsity)), value=UNSEEN), F.pad(memory, (0, count - len(memory)))

    def remember(self, slot: int, memory: Tensor) -> None:
        """What the method keeps of each segment, int64 `[S]`."""
        self._memory[slot] = memory
