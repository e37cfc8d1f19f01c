"""`random`: a control that evicts at random, the same on every run of a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy, View, check_range, register_policy

_MODULUS = 2**31 - 1
_MULTIPLIER = 48271  # Lehmer's generator (Park, Miller and Stockmeyer 1993); products stay below 2**63


@register_policy
@dataclass(frozen=True)
class Random(Policy):
    """Every compaction draws anew: each layer and kv head keeps a random set of its unpinned tokens.

    A method that does not beat this one chooses nothing. The numbers depend on the seed, the layer, the head,
    the position and the length at the compaction only, so neither batch nor device changes them.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, _MODULUS - 1)

    def score(self, view: View) -> Tensor:
        positions = view.positions.long()
        state = positions[:, -1:] + 1  # of the newest token, so the length
        head = torch.arange(positions.shape[0], device=positions.device)[:, None]
        for value in (self.seed, view.layer, head, positions):
            # Three rounds between two inputs: after one, neighbours are still a fixed distance apart.
            for _ in range(3):
                state = (state * _MULTIPLIER + value + 1) % _MODULUS
        for _ in range(3):
            state = state * _MULTIPLIER % _MODULUS
        return state.float() / _MODULUS
