"""A request as the simulation knows it: every token in plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.scheduler.planner import EvictionPlanner
from tests.simulation.model import KV_HEADS, of_head


class Cell(NamedTuple):
    """One token in one layer and head."""

    position: int
    key: Tensor
    value: Tensor
    log_beta: float


@dataclass
class Segments:
    """Segments of a request's text: sparsity of their attention, and how far they shrank for lack of room.

    Attributes:
        sparsities: by segment.
        steps: by segment, how far it shrank.
        quota: tokens of each segment after the latest compaction.
        order: segments in the order in which they shrink.
    """

    sparsities: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    quota: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


@dataclass
class Lookahead:
    """What the model computes ahead of a request, drawn before it is asked to.

    Attributes:
        queries: of the tokens computed ahead, `[layers, n, Hq, D]`.
        cache: keys of the cache behind which they are computed, by layer and head, sorted.
        question_keys: keys of the question's tokens, `[layers, n, H, D]`; None if a draft is decoded.
    """

    queries: Tensor
    cache: list[list[list[list[float]]]]
    question_keys: Tensor | None = None


@dataclass
class Running:
    """A running request.

    Attributes:
        budget, protected, managed: its limits.
        planner: when it is compacted.
        first_tracked: position from which sentences are tracked.
        blocks: its block table.
        tokens, hidden: token ids and last hidden states, by position.
        queries: `[layers, Hq, D]` by position; None for a token taken from the prefix cache.
        dense: tokens that must be held, by layer and head, ascending positions.
        logits: of the last token, if the prompt ends with it.
        lookahead: of the latest compaction, or None.
        question: token ids of the question.
        repeats: tokens to repeat, the next one last.
        mass: attention received so far by (layer, head, position).
        errors: accumulated change of the output without the token and number of queries, by (layer, head, position).
        segments: of its text.
    """

    name: str
    num_prompt: int
    budget: int
    protected: int
    managed: bool
    dense: list[list[list[Cell]]]
    planner: EvictionPlanner = field(default_factory=lambda: EvictionPlanner(None))
    num_logical: int = 0
    num_evicted: int = 0
    num_compactions: int = 0
    first_tracked: int = 0
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    lookahead: Lookahead | None = None
    question: list[int] = field(default_factory=lambda: list(range(20, 30)))
    repeats: list[int] = field(default_factory=list)
    mass: dict[tuple[int, int, int], float] = field(default_factory=dict)
    errors: dict[tuple[int, int, int], tuple[float, float]] = field(default_factory=dict)
    segments: Segments = field(default_factory=Segments)

    @property
    def num_resident(self) -> int:
        return self.num_logical - self.num_evicted

    @property
    def num_lookahead(self) -> int:
        """Tokens that were computed ahead for the latest compaction."""
        return 0 if self.lookahead is None else self.lookahead.queries.shape[1]

    def newest_queries(self, layer: int, head: int, count: int) -> Tensor:
        """Return the newest queries of a kv head, `[count, group, D]`."""
        newest = self.queries[self.num_logical - count : self.num_logical]
        return torch.stack([of_head(query[layer], head) for query in newest])

    def share(self, other: Running, length: int) -> None:
        """Take the first tokens of another request, as if from the prefix cache."""
        self.num_logical = length
        self.tokens, self.hidden = other.tokens[:length], other.hidden[:length]
        self.queries = [None] * length
        for layer, heads in enumerate(self.dense):
            for head in range(KV_HEADS):
                heads[head] = other.dense[layer][head][:length]
