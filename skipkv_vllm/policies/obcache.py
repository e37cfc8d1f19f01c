"""`obcache`: second-order error of the attention output (OBCache, arXiv 2510.07651)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, Policy, View, check_choice, check_odd, check_range, register_policy
from .value_aware import values_of

EFFECTS = {"value": ops.Effect.VALUE, "key": ops.Effect.KEY, "joint": ops.Effect.JOINT}


@register_policy
@dataclass(frozen=True)
class OBCache(Policy):
    """Second-order change in the output of a query if a token's value, key or both are pruned.

    With attention A, logit z, value v and output o of a query: `A^2 |v|^2` (value), `(A z)^2 |v - o|^2` (key) and
    `A^2 |v + z (v - o)|^2` (joint), summed over the queries and averaged over the query heads of a kv head.

    Attributes:
        form: "value", "key" or "joint".
        queries: number of newest queries that count; 0 for the whole window.
        pool: width of the max-pooling, odd; 1 for none.
    """

    name: ClassVar[str] = "obcache"
    about: ClassVar[About] = About(
        "OBCache",
        "2510.07651",
        "O(W G L D)",
        "over the window's queries or the newest ones, pooled as SnapKV; not accumulated over the whole text",
    )
    needs: ClassVar[Need] = Need.QUERIES | Need.KEYS | Need.VALUES

    form: str = "joint"
    queries: int = 0
    pool: int = 7

    def __post_init__(self) -> None:
        check_choice("form", self.form, tuple(EFFECTS))
        check_range("queries", self.queries, 0, 4096)
        check_range("pool", self.pool, 1, 63)
        check_odd("pool", self.pool)

    def score(self, view: View) -> Tensor:
        assert view.queries is not None
        assert view.keys is not None
        queries, values = view.queries[-self.queries :], values_of(view)[:, None, None]
        logits = ops.attention_logits(queries, view.keys.transpose(0, 1), view.positions)  # [H, G, n, L]
        attention = ops.attention_weights(logits, view.sink_logits)
        if self.form == "value":
            error = attention**2 * values.square().sum(dim=-1)
        else:
            # Tokens after a query do not contribute to its output.
            logits = logits.masked_fill(logits == -torch.inf, 0.0)[..., None]
            output = attention @ values[:, :, 0]
            change = logits * (values - output[..., None, :])
            error = attention**2 * (change + values if self.form == "joint" else change).square().sum(dim=-1)
        return ops.pooled(error.sum(dim=2).mean(dim=1), view.window, self.pool)

    def score_batch(self, held: Held) -> Tensor:
        count = min(self.queries or held.window, held.window)
        return held.pooled(held.attention(EFFECTS[self.form], [count] * len(held.requests)), self.pool)
