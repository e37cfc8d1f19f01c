"""`finch`: attention of the question at the end of the prompt (Finch, Corallo and Papotti, arXiv 2408.00167)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..core.needs import Need
from .base import About, Held, LookaheadPlan, Policy, View, check_range, register_policy


@register_policy
@dataclass(frozen=True)
class Finch(Policy):
    """Attention of the question's queries, each times the number of tokens it sees, averaged over them and the query
    heads of a kv head. The question itself always stays. In text that the model writes, the newest W queries score.

    Attributes:
        task_tokens: length of the question, the last tokens of the prompt; 0 for the window. A request sets its own
            with `kv_task_tokens`.
        ask_chunks: append the question to each chunk of a prompt longer than the bound and let it score there too, as
            the original does. Off: the newest tokens of each chunk score.
    """

    name: ClassVar[str] = "finch"
    about: ClassVar[About] = About(
        "Finch",
        "2408.00167",
        "O(W G L D)",
        "the question is at most W tokens; keys keep their positions, the paper turns them to contiguous ones; between "
        "chunks of a prompt longer than the bound the newest tokens score, unless `ask_chunks` appends the question to "
        "each as the paper does, or `--kv-defer-prompt` holds the prompt whole",
    )
    compacts_prompt: ClassVar[bool] = True

    task_tokens: int = 0
    ask_chunks: bool = False

    def __post_init__(self) -> None:
        check_range("task_tokens", self.task_tokens, 0, 64)

    @property
    def needs(self) -> Need:  # type: ignore[override]
        """A question that is computed ahead needs lookahead."""
        return Need.QUERIES | Need.KEYS | (Need.LOOKAHEAD if self.ask_chunks else Need.NOTHING)

    @property
    def lookahead_plan(self) -> LookaheadPlan | None:
        return LookaheadPlan() if self.ask_chunks else None

    def num_question(self, window: int) -> int:
        return self.task_tokens or window

    def with_question(self, num_question: int) -> Finch:
        return dataclasses.replace(self, task_tokens=num_question)

    def score(self, view: View) -> Tensor:
        assert view.queries is not None
        assert view.keys is not None
        is_written = view.num_logical > view.num_prompt
        queries = view.queries if is_written else view.queries[-self.num_question(view.window) :]
        logits = ops.attention_logits(queries, view.keys.transpose(0, 1), view.positions)  # [H, G, n, L]
        num_seen = (logits > -torch.inf).sum(dim=-1, keepdim=True)
        return (ops.attention_weights(logits, view.sink_logits) * num_seen).mean(dim=(1, 2))

    def score_batch(self, held: Held) -> Tensor:
        question = min(self.num_question(held.window), held.window)
        counts = [
            0 if r.num_ahead else held.window if r.num_logical > r.num_prompt else question for r in held.requests
        ]
        seen = held.attention(ops.Effect.SEEN, counts)
        if held.lookahead_queries is not None:
            seen += held.attention_ahead(ops.Effect.SEEN)
        numbers = [r.num_ahead or count for r, count in zip(held.requests, counts, strict=True)]
        return seen / held.column(numbers)
