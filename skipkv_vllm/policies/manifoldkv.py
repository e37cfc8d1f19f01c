"""`manifoldkv`: keys far from the centre of their neighbourhood (ManifoldKV, arXiv 2602.08343)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.needs import Need
from .base import About, Held, Policy, View, check_range, register_policy
from .held import WHOLE


@register_policy
@dataclass(frozen=True)
class ManifoldKV(Policy):
    """Euclidean distance of a key from the mean key of its head.

    Attributes:
        centroid_window: number of consecutive held tokens that share a mean (the windowed variant; 4096 in the
            authors' tests); 0 for one mean of all tokens.
    """

    name: ClassVar[str] = "manifoldkv"
    about: ClassVar[About] = About(
        "ManifoldKV", "2602.08343", "O(L D)", "equal budgets for all heads; its authors combine it with AdaKV"
    )
    needs: ClassVar[Need] = Need.KEYS

    centroid_window: int = 0

    def __post_init__(self) -> None:
        check_range("centroid_window", self.centroid_window, 0, 2**20)

    def score(self, view: View) -> Tensor:
        assert view.keys is not None
        parts = view.keys.float().split(self.centroid_window or len(view.keys))
        return torch.cat([(part - part.mean(dim=0)).norm(dim=-1) for part in parts]).T

    def score_batch(self, held: Held) -> Tensor:
        return held.key_norms(self.centroid_window or WHOLE)
