"""`caote`: the error in the attention output if a token is left out (CAOTE, arXiv 2504.14051)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import About, Held, View, check_choice, register_policy
from .value_aware import ValueAware, values_of

LEAST_REST = 1e-6
"""Bounds the error of a token that receives all the attention, which would be infinite."""


@register_policy
@dataclass(frozen=True)
class CAOTE(ValueAware):
    """`a / (1 - a) * |o - v|` with a token's attention weight a, its value v and the output o of all held tokens.

    The original removes one token after another; here a compaction scores all tokens at once.

    Attributes:
        base: method that gives the attention weights.
        form: "exact", or "fast" with the mean of all values instead of o.
    """

    name: ClassVar[str] = "caote"
    about: ClassVar[About] = About(
        "CAOTE",
        "2504.14051",
        "the base's, and O(L D)",
        "all tokens of a compaction are scored at once, not one after the other",
    )

    form: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, ("exact", "fast"))

    def score(self, view: View) -> Tensor:
        weights, values = self.base_weights(view), values_of(view)
        if self.form == "exact":
            output = (weights[..., None] * values).sum(dim=1, keepdim=True)
        else:
            output = values.mean(dim=1, keepdim=True)
        return _relative(weights) * (output - values).norm(dim=-1)

    def score_batch(self, held: Held) -> Tensor:
        weights = self.base_weights_batch(held)
        return _relative(weights) * held.value_distances(weights if self.form == "exact" else None)


def _relative(weights: Tensor) -> Tensor:
    """Divide each weight by what the others have together."""
    return weights / (1 - weights).clamp(min=LEAST_REST)
