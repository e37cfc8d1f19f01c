"""`h2o`: heavy hitters, the tokens that have received the most attention (H2O, Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.needs import Need
from .base import About, Held, Policy, View, check_range, register_policy

RECENT = 1e6
"""Exceeds any attention mass, as a query adds at most 1."""


@register_policy
@dataclass(frozen=True)
class H2O(Policy):
    """Spend a share of the budget on the newest tokens, and the rest on those with the largest attention mass.

    The mass is exact: every query from the prompt's last token on counts once, over the tokens held at its time.
    Queries of earlier prompt tokens do not count, so that neither chunked prefill nor a prefix-cache hit changes the
    selection. If a prompt is compacted before its end, queries count from one buffer before that compaction on.

    Attributes:
        recent_share: share of the budget for the newest tokens.
    """

    name: ClassVar[str] = "h2o"
    about: ClassVar[About] = About(
        "H2O",
        "2306.14048",
        "O(L), and O(n G L D) for every n queries",
        "queries before the prompt's last token are not counted (where the prompt may be evicted: before the last "
        "buffer ahead of the first compaction)",
    )
    needs: ClassVar[Need] = Need.ATTENTION_MASS | Need.QUERIES | Need.KEYS

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_range("recent_share", self.recent_share, 0.0, 1.0)

    def weights(self, view: View) -> Tensor:
        assert view.attention_mass is not None
        return view.attention_mass / view.attention_mass.sum(dim=-1, keepdim=True)

    def score(self, view: View) -> Tensor:
        assert view.attention_mass is not None
        newest = view.positions[:, -1:]
        recent = view.positions > newest - int(self.recent_share * view.num_keep)
        # Newer tokens score higher, as a long protected prompt may leave no room for all of them.
        return torch.where(recent, view.positions.float() + RECENT, view.attention_mass)

    def weights_batch(self, held: Held) -> Tensor:
        assert held.attention_mass is not None
        mass = held.attention_mass * held.is_held
        return mass / mass.sum(dim=-1, keepdim=True)

    def score_batch(self, held: Held) -> Tensor:
        assert held.attention_mass is not None
        recent = held.column([r.num_logical - int(self.recent_share * r.num_keep) for r in held.requests])
        return torch.where(held.positions >= recent, held.positions.float() + RECENT, held.attention_mass)
