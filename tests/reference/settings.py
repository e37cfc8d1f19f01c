"""What a request asks of the oracle, and what the oracle reports about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

LOOKAHEAD = 8
ABOUT_PROMPTS = ("finch", "laq")
"""Methods that compact a prompt as soon as it is computed."""


class EngineTrace(Protocol):
    """The part of the engine's trace of a request that the oracle may read, for near ties only."""

    logical_length: Tensor
    kept: list[Tensor]


@dataclass(frozen=True, eq=False)
class Steering:
    """Adds `min(alpha0 + gamma * N, alpha_max)` times `vector` `[hidden]` to the input of `layer`."""

    layer: int
    vector: Tensor
    alpha0: float
    gamma: float
    alpha_max: float = float("inf")
    interval: int = 128
    compat: str = "default"


@dataclass(frozen=True)
class Settings:
    """Method and limits of a request, in tokens."""

    method: str
    granularity: str
    budget: int
    buffer: int
    window: int = 8
    protect_prompt: bool = True
    defer_prompt: bool = False
    num_question: int = 8
    ask_chunks: bool = False
    lookahead: int = LOOKAHEAD
    with_window: bool = False
    steering: Steering | None = None
    recall_share: float = 0.0
    recall_interval: int = 1
    recall_threshold: float = 0.0
    parameters: tuple[tuple[str, Any], ...] = ()
    """of the method, where they differ from its defaults; read by methods with segments, and for `compat`"""

    @property
    def by_error(self) -> bool:
        """Whether tokens are scored by the change of the output without them."""
        return self.method == "skipkv" and dict(self.parameters).get("compat", "default") == "default"

    def keep(self, num_prompt: int) -> int:
        """Tokens left by a compaction."""
        return max(self.budget, num_prompt + self.window) if self.protect_prompt else self.budget

    def num_recalled(self, num_prompt: int) -> int:
        """How many of these may be replaced by tokens evicted before."""
        first = max(num_prompt if self.protect_prompt else 0, 4 if self.method == "streaming_llm" else 0)
        return int(self.recall_share * (self.keep(num_prompt) - first - self.window))

    def swaps(self, num_prompt: int, num_computed: int) -> bool:
        """Whether the tokens that came back are exchanged, if nothing is compacted."""
        num_decoded = num_computed - num_prompt
        at_interval = num_decoded > 0 and num_decoded % self.recall_interval == 0
        return self.num_recalled(num_prompt) > 0 and (num_decoded in (-8, -4, -1) or at_interval)

    def bound(self, num_prompt: int, is_first: bool) -> int:
        """Tokens at which a compaction takes place."""
        bound = self.keep(num_prompt) + self.buffer
        if not (is_first and self.defer_prompt):
            return bound
        return max(bound, num_prompt if self.method in ABOUT_PROMPTS else num_prompt + self.window)

    def ends_prompt(self, num_prompt: int, num_computed: int, num_resident: int) -> bool:
        """Whether a prompt is complete now and compacted at its end."""
        return self.method in ABOUT_PROMPTS and num_computed == num_prompt and num_resident > self.keep(num_prompt)


@dataclass(frozen=True)
class Event:
    """A compaction or swap; `kept` is int64 `[layers, heads, held]`, ascending positions of the tokens held then."""

    num_logical: int
    num_resident: int
    kept: Tensor


@dataclass
class Result:
    """Outcome of one request; `num_ties` of the `num_selected` survivors were taken from the engine."""

    tokens: list[int]
    events: list[Event] = field(default_factory=list)
    num_ties: int = 0
    num_selected: int = 0
    alphas: list[float] = field(default_factory=list)
    """by position, 0 where nothing was added"""
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """log probability of the likeliest token minus that of the token taken; 0 unless an engine chose"""
    sparsities: list[float] = field(default_factory=list)
    """of the attention at the end of every segment, where the method has segments"""


class SelectionError(AssertionError):
    """The engine kept tokens that the oracle evicts by a clear margin."""
