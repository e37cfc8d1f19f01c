"""The attention that the held tokens of a request have received so far, for methods that add it up."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 256
"""Tokens by which a buffer grows."""


class AttentionMass:
    """float32 `[layers, H, capacity]` per running request, by slot, growing with what the request holds.

    It is kept by request and not by page, because requests that share a page attend to it differently.
    """

    def __init__(self) -> None:
        self._mass: dict[int, Tensor] = {}

    def forget(self, slot: int) -> None:
        """The request in this state slot ended or starts over."""
        self._mass.pop(slot, None)

    def add(self, slot: int, received: Tensor) -> None:
        """Count attention `[layers, H, length]` received by the tokens in the first `length` slots."""
        self._sized(slot, received)[..., : received.shape[-1]] += received

    def read(self, slot: int, like: Tensor) -> Tensor:
        """The mass by slot, in the shape of `like` `[layers, H, length]`; 0 for what was never counted."""
        return self._sized(slot, like)[..., : like.shape[-1]]

    def move(self, slot: int, num_keep: int, source: Tensor, hole: Tensor, valid: Tensor) -> None:
        """Follow a compaction; the moves are those of `ops.move_list`."""
        mass = self._mass[slot]
        # Padding goes to a place beyond the kept ones, and those are cleared for the tokens to come.
        mass.scatter_(-1, torch.where(valid, hole, num_keep), mass.gather(-1, source))
        mass[..., num_keep:] = 0

    def _sized(self, slot: int, like: Tensor) -> Tensor:
        layers, heads, length = like.shape
        held = self._mass.get(slot)
        if held is None or held.shape[-1] < length:
            grown = torch.zeros(layers, heads, (length // GROWTH + 1) * GROWTH, dtype=torch.float32, device=like.device)
            if held is not None:
                grown[..., : held.shape[-1]] = held
            self._mass[slot] = held = grown
        return held
