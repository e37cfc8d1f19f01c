"""The host's part of steering: where it starts, in which state, and the thought counts of a finished request.

The workers compute the coefficients step by step. Both the state at the start and the counts at the end follow from
the text alone, so the host computes them with the same operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import ops
from ..core.orders import SteeredRequest, Strength
from .tables import ThoughtTables

BEYOND_ANY_TEXT = 2**62
"""Interval longer than any text, so that the strength never changes."""

KINDS = ("execution", "reflection", "transition")


class Thoughts(NamedTuple):
    """Thought counts of a finished request, and how often it was steered.

    Attributes:
        steered_tokens: tokens to which a vector was added.
        execution, reflection, transition: sentences of the output by kind.
    """

    steered_tokens: int
    execution: int
    reflection: int
    transition: int


class SteeringController:
    """Find where the steering of a request starts, and count its thoughts when it ends.

    Args:
        tables: tables of the tokenizer.
        interval: positions between two updates of the strength.
        counts_prompt: follow the published code: count the prompt's sentences, and let its last token be steered.
    """

    def __init__(self, tables: ThoughtTables, interval: int, counts_prompt: bool) -> None:
        self._tables = tables
        self._interval = interval
        self._counts_prompt = counts_prompt
        self._track = ops.function("track_thoughts", torch.device("cpu"))

    def first(self, num_prompt: int) -> int:
        """Return the position of the first token that may be steered; steering leaves the KV before it unchanged."""
        return num_prompt - self._counts_prompt

    def start(self, request_id: str, prompt: Sequence[int], vector: int, strength: Strength) -> SteeredRequest:
        """Compute the state at the first steered token, e.g. whether the prompt leaves the model thinking.

        Args:
            request_id: the request.
            prompt: token ids.
            vector: row of its vector, from 1; 0 to count thoughts without steering.
            strength: coefficients of the request.
        """
        first = self.first(len(prompt))
        read = self._run([0] * len(ops.STATE), prompt[:first], 0, Strength(0, 0, 0), BEYOND_ANY_TEXT)
        kept = read if self._counts_prompt else {"thinking": read["thinking"]}
        state = [vector if column == "vector" else kept.get(column, 0) for column in ops.STATE]
        return SteeredRequest(request_id, first, state, strength)

    def finish(self, start: SteeredRequest, token_ids: Sequence[int]) -> Thoughts:
        """Count the thoughts of a finished request.

        Args:
            start: what `start` returned for it.
            token_ids: prompt and output without the last sampled token, which the model never read.
        """
        after = self._run(start.state, token_ids[start.first :], start.first, start.strength, self._interval)
        before = dict(zip(ops.STATE, start.state, strict=True))
        return Thoughts(after["steered"], *(after[kind] - before[kind] for kind in KINDS))

    def _run(
        self, state: list[int], token_ids: Sequence[int], position: int, strength: Strength, interval: int
    ) -> dict[str, int]:
        tokens = torch.tensor(token_ids, dtype=torch.int64)
        spans = torch.tensor([[0], [0], [len(token_ids)], [position]])
        row, coefficient = torch.zeros(len(token_ids), dtype=torch.int32), torch.zeros(len(token_ids))
        held = torch.tensor([state], dtype=torch.int32)
        tables, strengths = self._tables, torch.tensor([strength], dtype=torch.float32)
        self._track(
            *(tokens, spans, tables.vocabulary, tables.keywords, tables.merge, interval),
            *(strengths, held, 0, row, coefficient),
        )
        return dict(zip(ops.STATE, held[0].tolist(), strict=True))
