"""`h2o`: heavy hitters, the tokens that have received most attention (H2O, Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.needs import Need
from .base import About, Policy, View, check_range, register_policy

RECENT = 1e6  # above any attention mass: a query gives at most 1


@register_policy
@dataclass(frozen=True)
class H2O(Policy):
    """Half of the budget goes to the newest tokens, the rest to those with the largest attention mass.

    The mass is exact: every query from the prompt's last token on is counted once, over the tokens held at its
    time. Queries of earlier prompt tokens are not counted, so that neither chunked prefill nor a prefix-cache
    hit changes what is kept. A prompt that is compacted before its end is counted from one buffer before that on.

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
        # The newer first: a long protected prompt may leave no room for all of them.
        return torch.where(recent, view.positions.float() + RECENT, view.attention_mass)
