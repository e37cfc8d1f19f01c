"""`laq`: attention of the first tokens of a draft answer (Lookahead Q-Cache, Wang et al., arXiv 2505.20334)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, LookaheadPlan, Policy, View, check_odd, check_range, register_policy
from .snapkv import SnapKV


@register_policy
@dataclass(frozen=True)
class LAQ(Policy):
    """Attention of the first tokens of a draft answer, summed over them, averaged over the query heads of a kv head and
    max-pooled. The draft is decoded greedily on a temporary copy of the cache that SnapKV has compacted, and then
    discarded. Text that the model writes is scored as by SnapKV.

    Attributes:
        lookahead: tokens of the draft.
        with_window: also count the last W queries of the prompt (LAQ++).
        pool: width of the max-pooling, odd.
    """

    name: ClassVar[str] = "laq"
    about: ClassVar[About] = About(
        "LAQ",
        "2505.20334",
        "O(W G L D); at the end of a prompt `lookahead` forward passes more, and O(n G L D) for their n queries",
        "the copy keeps as many tokens as the request, by the window's queries; a prompt longer than the bound is "
        "compacted between chunks as by SnapKV (`--kv-defer-prompt` holds it whole instead)",
    )
    needs: ClassVar[Need] = Need.QUERIES | Need.KEYS | Need.LOOKAHEAD
    compacts_prompt: ClassVar[bool] = True

    lookahead: int = 8
    with_window: bool = False
    pool: int = 7

    def __post_init__(self) -> None:
        check_range("lookahead", self.lookahead, 1, 64)
        check_range("pool", self.pool, 1, 63)
        check_odd("pool", self.pool)

    @property
    def draft(self) -> SnapKV:
        """Method that compacts the copy and the text that the model writes."""
        return SnapKV(self.pool)

    @property
    def lookahead_plan(self) -> LookaheadPlan:
        return LookaheadPlan(self.lookahead, self.draft)

    def score(self, view: View) -> Tensor:
        if view.lookahead_queries is None:
            return self.draft.score(view)
        assert view.queries is not None
        assert view.keys is not None
        keys = view.keys.transpose(0, 1)
        received = ops.attention_received(
            view.lookahead_queries, keys, view.positions, len(view.lookahead_queries), view.sink_logits
        )
        if self.with_window:
            received += ops.attention_received(view.queries, keys, view.positions, sinks=view.sink_logits)
        return ops.pooled(received, view.window, self.pool)

    def score_batch(self, held: Held) -> Tensor:
        if held.lookahead_queries is None:
            return self.draft.score_batch(held)
        received = held.attention_ahead()
        counts = [held.window if self.with_window or not request.num_ahead else 0 for request in held.requests]
        if any(counts):
            received += held.attention(counts=counts)
        return held.pooled(received, self.pool)
