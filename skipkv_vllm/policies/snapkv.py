"""`snapkv`: attention of the last queries (SnapKV, Li et al., arXiv 2404.14469), applied while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, Policy, View, check_odd, check_range, register_policy


@register_policy
@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the last W queries, summed over them, averaged over the query heads of a kv head and max-pooled.

    The original compresses the prompt once, after prefill. Here it runs at every compaction, with the pooling of R-KV's
    decoding baseline (maximum over 7 neighbours).

    Attributes:
        pool: width of the max-pooling, odd.
    """

    name: ClassVar[str] = "snapkv"
    about: ClassVar[About] = About(
        "SnapKV",
        "2404.14469",
        "O(W G L D)",
        "runs at every compaction, not once after the prompt; maximum over 7 neighbours as in R-KV's baseline",
    )
    needs: ClassVar[Need] = Need.QUERIES | Need.KEYS

    pool: int = 7

    def __post_init__(self) -> None:
        check_range("pool", self.pool, 1, 63)
        check_odd("pool", self.pool)

    def weights(self, view: View) -> Tensor:
        return self._received(view) / view.window

    def _received(self, view: View) -> Tensor:
        assert view.queries is not None
        assert view.keys is not None
        return ops.attention_received(view.queries, view.keys.transpose(0, 1), view.positions, sinks=view.sink_logits)

    def score(self, view: View) -> Tensor:
        return ops.pooled(self._received(view), view.window, self.pool)

    def weights_batch(self, held: Held) -> Tensor:
        return held.attention() / held.window

    def score_batch(self, held: Held) -> Tensor:
        return held.pooled(held.attention(), self.pool)
