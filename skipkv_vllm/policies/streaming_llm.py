"""`streaming_llm`: attention sinks and the most recent tokens (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import About, Held, Policy, View, check_range, register_policy


@register_policy
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first `sinks` tokens and the newest ones. Positions stay logical (keys are not rotated again)."""

    name: ClassVar[str] = "streaming_llm"
    about: ClassVar[About] = About(
        "StreamingLLM", "2309.17453", "O(L)", "positions stay logical; the paper numbers the held tokens anew"
    )

    sinks: int = 4

    def __post_init__(self) -> None:
        check_range("sinks", self.sinks, 0, 4096)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def score(self, view: View) -> Tensor:
        return view.positions.float()

    def score_batch(self, held: Held) -> Tensor:
        return held.positions.float()
