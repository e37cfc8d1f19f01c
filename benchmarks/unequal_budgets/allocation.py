"""Ways to divide the tokens of a row: equal shares, AdaKV's by head, EpiCache's by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skipkv_vllm.policies.selection import select_per_head


class Allocation(Protocol):
    """A way to divide tokens; all ways keep `layers * heads * keep` tokens of a row."""

    def select(self, scores: Sequence[Tensor], pinned: Sequence[Tensor], num_pinned: int, keep: int) -> list[Tensor]:
        """Survivors by layer, bool `[R, H, N]`.

        Args:
            scores: float32 `[R, H, N]` by layer, in ascending position; minus infinity where nothing is held.
            pinned: bool, of the same shapes: tokens that stay, equally many in every head.
            num_pinned: that number.
            keep: tokens that a head may keep on average.
        """


class Equal:
    """Every layer and head keeps the same number of tokens, as in the engine."""

    def select(self, scores: Sequence[Tensor], pinned: Sequence[Tensor], num_pinned: int, keep: int) -> list[Tensor]:
        return [select_per_head(score, pin, keep) for score, pin in zip(scores, pinned, strict=True)]


@dataclass(frozen=True)
class ByHead:
    """AdaKV (arXiv 2407.11550): the best tokens of a layer stay, whichever head they are of, but no head falls below a
    share of what it would have had.

    Attributes:
        safeguard: that share.
    """

    safeguard: float = 0.2

    def select(self, scores: Sequence[Tensor], pinned: Sequence[Tensor], num_pinned: int, keep: int) -> list[Tensor]:
        floor = num_pinned + int(self.safeguard * (keep - num_pinned))
        survivors = []
        for score, pin in zip(scores, pinned, strict=True):
            safe = select_per_head(score, pin, floor)
            # One row of all heads, by position, so that of equal scores the earlier token stays.
            together = score.transpose(1, 2).flatten(1), safe.transpose(1, 2).flatten(1)
            kept = select_per_head(*together, keep * score.shape[1])
            survivors.append(kept.unflatten(1, (-1, score.shape[1])).transpose(1, 2))
        return survivors


@dataclass(frozen=True)
class ByLayer:
    """EpiCache (arXiv 2509.17396): layers whose keys depend more on distant text keep more tokens.

    Attributes:
        similarity: of each layer, see `generation.layer_similarity`.
        exponent: how much more; 0 shares equally.
        least: share of its equal budget that every layer gets.
    """

    similarity: tuple[float, ...]
    exponent: float
    least: float = 0.25

    def weights(self) -> list[float]:
        """`(1 - c)^exponent` with c the similarity from 0 to 1."""
        low, high = min(self.similarity), max(self.similarity)
        return [(1 - (c - low) / (high - low)) ** self.exponent for c in self.similarity]

    def select(self, scores: Sequence[Tensor], pinned: Sequence[Tensor], num_pinned: int, keep: int) -> list[Tensor]:
        room = [score.shape[2] - num_pinned for score in scores]
        budgets = shares(self.weights(), (keep - num_pinned) * len(scores), int(self.least * (keep - num_pinned)), room)
        return [
            select_per_head(score, pin, num_pinned + budget)
            for score, pin, budget in zip(scores, pinned, budgets, strict=True)
        ]


def shares(weights: Sequence[float], total: int, least: int, most: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to the weights but within `least` and `most`.

    Args:
        weights: not negative, not all 0.
        total: at least `least` for each, at most the sum of `most`.
        least: of each number.
        most: of each number.
    """
    limit, weight = torch.tensor(most, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    # A weight of 0 gets something once all others have the most they can.
    weight = weight.clamp(min=1e-9 * float(weight.max()))
    low, high = 0.0, float((limit / weight).max())
    for _ in range(200):
        scale = (low + high) / 2
        if float((scale * weight).clamp(min=least).minimum(limit).sum()) < total:
            low = scale
        else:
            high = scale
    exact = (high * weight).clamp(min=least).minimum(limit)
    numbers = exact.floor()
    for i in (exact - numbers).argsort(descending=True)[: total - int(numbers.sum())].tolist():
        numbers[i] += 1
    return numbers.int().tolist()
