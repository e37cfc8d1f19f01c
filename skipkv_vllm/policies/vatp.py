"""`vatp`: attention times the norm of the value (VATP, Guo et al., arXiv 2406.12335)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import About, Held, View, register_policy
from .value_aware import ValueAware, values_of


@register_policy
@dataclass(frozen=True)
class VATP(ValueAware):
    """Attention weight times the l1 norm of the value.

    Attributes:
        base: method that gives the attention weights; the original uses accumulated attention, here `h2o`.
    """

    name: ClassVar[str] = "vatp"
    about: ClassVar[About] = About(
        "VATP", "2406.12335", "the base's, and O(L D)", "no sinks beside the protected prompt"
    )

    base: str = "h2o"

    def score(self, view: View) -> Tensor:
        return self.base_weights(view) * values_of(view).abs().sum(dim=-1)

    def score_batch(self, held: Held) -> Tensor:
        return self.base_weights_batch(held) * held.value_sums()
