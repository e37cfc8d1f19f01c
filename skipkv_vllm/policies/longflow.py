"""`longflow`: what the newest query takes from a token (LongFlow, arXiv 2603.11504)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import About, register_policy
from .vatp import VATP


@register_policy
@dataclass(frozen=True)
class LongFlow(VATP):
    """Attention weight of the newest query times the l1 norm of the value.

    The original evicts one token at every step, the same one for all heads of a layer, inside its attention kernel;
    here the score decides at every compaction, for each kv head. With `base` it takes another method's attention.

    Attributes:
        base: whose attention weights.
    """

    name: ClassVar[str] = "longflow"
    about: ClassVar[About] = About(
        "LongFlow",
        "2603.11504",
        "the base's, and O(L D)",
        "decides at every compaction and for every kv head, not at every token for a whole layer",
    )

    base: str = "tova"
