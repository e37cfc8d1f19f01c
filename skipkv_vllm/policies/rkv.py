"""`rkv`: token importance minus token redundancy (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, Policy, View, check_odd, check_range, register_policy


@register_policy
@dataclass(frozen=True)
class RKV(Policy):
    """`mix * I - (1 - mix) * R` per layer and kv head, eqs. 4-5 of SkipKV (arXiv 2512.07993).

    Attributes:
        mix: weight of importance against redundancy.
        pool: width of the max-pooling of importance, odd.
        redundancy_threshold: key cosine above which the last similar key is exempt.
    """

    name: ClassVar[str] = "rkv"
    about: ClassVar[About] = About("R-KV", "2505.24133", "O(W G L D + L² D)")
    needs: ClassVar[Need] = Need.QUERIES | Need.KEYS

    mix: float = 0.1
    pool: int = 7
    redundancy_threshold: float = 0.5

    def __post_init__(self) -> None:
        check_range("mix", self.mix, 0.0, 1.0)
        check_range("pool", self.pool, 1, 63)
        check_range("redundancy_threshold", self.redundancy_threshold, -1.0, 1.0)
        check_odd("pool", self.pool)

    def score(self, view: View) -> Tensor:
        assert view.queries is not None
        assert view.keys is not None
        importance = ops.importance(view.queries, view.keys, window=view.window, pool=self.pool)
        redundancy = ops.redundancy(view.keys, threshold=self.redundancy_threshold)
        old = importance.shape[1]
        score = self.mix * importance - (1 - self.mix) * redundancy[:, :old]
        # The runtime pins the window, so its score does not matter.
        return torch.nn.functional.pad(score, (0, view.window))

    def score_batch(self, held: Held) -> Tensor:
        return held.token_scores(self.pool, self.mix, self.redundancy_threshold)
