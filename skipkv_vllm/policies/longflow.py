"""`longflow`: contribution of a token to the newest query's output (LongFlow, arXiv 2603.11504)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import About, register_policy
from .vatp import VATP


@register_policy
@dataclass(frozen=True)
class LongFlow(VATP):
    """Attention weight of the newest query times the l1 norm of the value.

    The original evicts one token at every step inside its attention kernel, the same one for all heads of a layer. Here
    the score decides at every compaction, for each kv head. `base` selects another method's attention.

    Attributes:
        base: method that gives the attention weights.
    """

    name: ClassVar[str] = "longflow"
    about: ClassVar[About] = About(
        "LongFlow",
        "2603.11504",
        "the base's, and O(L D)",
        "decides at every compaction and for every kv head, not at every token for a whole layer",
    )

    base: str = "tova"
