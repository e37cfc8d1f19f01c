"""`random`: a control that evicts at random, reproducibly for each seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.device import to_device
from .base import About, Held, Policy, View, check_range, register_policy

_BITS = 2**32 - 1


def _mixed(state: Tensor) -> Tensor:
    """Hash 32-bit integers (Wellons, hash-prospector, 21f0aaad-735a2d97); products stay below 2**63."""
    state = ((state ^ (state >> 16)) * 0x21F0AAAD) & _BITS
    state = ((state ^ (state >> 15)) * 0x735A2D97) & _BITS
    return state ^ (state >> 15)


@register_policy
@dataclass(frozen=True)
class Random(Policy):
    """Keep a random set of unpinned tokens in each layer and kv head, drawn anew at every compaction.

    A method that does not beat this one selects no better than chance. The numbers depend only on the seed, the layer,
    the head, the position and the length at the compaction. They are the same in any batch, on any device and for any
    number of devices that share the model.

    Attributes:
        seed: seed of the draws.
        sinks: number of first tokens that always stay, for prompts that are not protected.
    """

    name: ClassVar[str] = "random"
    about: ClassVar[About] = About("a control", cost="O(L)", departs="draws anew at every compaction")

    seed: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**31 - 1)
        check_range("sinks", self.sinks, 0, 4096)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def score(self, view: View) -> Tensor:
        positions = view.positions.long()
        heads = torch.arange(positions.shape[0], device=positions.device)[:, None]
        return self._draw(positions[:, -1:] + 1, view.layer, view.first_head + heads, positions)

    def score_batch(self, held: Held) -> Tensor:
        device, (_, layers, heads, _) = held.positions.device, held.positions.shape
        layer = to_device(list(held.layers or range(layers)), torch.int64, device)[:, None, None]
        head = held.first_head + torch.arange(heads, device=device)[:, None]
        return self._draw(held.num_logical.long(), layer, head, held.positions.long())

    def _draw(self, num_logical: Tensor, layer: Tensor | int, head: Tensor, positions: Tensor) -> Tensor:
        """Hash int64 numbers, which broadcast against each other, to float32 from 0 to 1."""
        state = _mixed(num_logical)
        for value in (self.seed, layer, head, positions):
            # A linear generator would give neighbours and heads draws that are shifts of each other.
            state = _mixed((state + value) & _BITS)
        return state.float() / 2**32
