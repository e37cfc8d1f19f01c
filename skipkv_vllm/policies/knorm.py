"""`knorm`: keys of small norm (Devoto et al., arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.needs import Need
from .base import About, Held, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class KNorm(Policy):
    """Minus the norm of the key: on average, tokens whose keys have a large norm receive little attention."""

    name: ClassVar[str] = "knorm"
    about: ClassVar[About] = About("L2 norm", "2406.11430", "O(L D)", "decides at every compaction, not at every token")
    needs: ClassVar[Need] = Need.KEYS

    def score(self, view: View) -> Tensor:
        assert view.keys is not None
        return -view.keys.float().norm(dim=-1).T

    def score_batch(self, held: Held) -> Tensor:
        return -held.key_norms()
