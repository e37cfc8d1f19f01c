"""`tova`: attention of the newest query (TOVA, Oren et al., arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the newest query, averaged over the query heads of a kv head.

    The original averages over all heads of a layer, which then keep the same tokens. Here every kv head keeps its own,
    so that tensor-parallel ranks need not agree.
    """

    name: ClassVar[str] = "tova"
    about: ClassVar[About] = About(
        "TOVA", "2401.06104", "O(G L D)", "every kv head keeps its own tokens; the paper averages over a layer's heads"
    )
    needs: ClassVar[Need] = Need.QUERIES | Need.KEYS

    def weights(self, view: View) -> Tensor:
        assert view.queries is not None
        assert view.keys is not None
        return ops.attention_received(
            view.queries[-1:], view.keys.transpose(0, 1), view.positions, sinks=view.sink_logits
        )

    def score(self, view: View) -> Tensor:
        return self.weights(view)

    def weights_batch(self, held: Held) -> Tensor:
        return held.attention(counts=[1] * len(held.requests))

    def score_batch(self, held: Held) -> Tensor:
        return self.weights_batch(held)
