"""`keydiff`: keys that differ from the others (KeyDiff, Park et al., arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..core.needs import Need
from .base import About, Held, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine of a key with the mean of all held unit keys of its head."""

    name: ClassVar[str] = "keydiff"
    about: ClassVar[About] = About("KeyDiff", "2504.15364", "O(L D)", "decides at every compaction, not at every block")
    needs: ClassVar[Need] = Need.KEYS

    def score(self, view: View) -> Tensor:
        assert view.keys is not None
        unit = F.normalize(view.keys.float(), dim=-1)
        return -F.cosine_similarity(unit, unit.mean(dim=0), dim=-1).T

    def score_batch(self, held: Held) -> Tensor:
        return -held.key_similarity()
