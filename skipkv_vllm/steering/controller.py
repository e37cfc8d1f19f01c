"""The host's part of steering: from which token on, in which state, and what came of it.

The workers compute the coefficients, step by step. What they start from and what they did follows from the text
alone, so the host finds both with the same operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import ops
from ..core.orders import SteeredRequest, Strength
from .tables import ThoughtTables

NEVER = 2**62
"""An interval that no position reaches."""

KINDS = ("execution", "reflection", "transition")


class Thoughts(NamedTuple):
    """What a request thought, and how often it was steered.

    Attributes:
        steered_tokens: tokens that a vector was added to.
        execution, reflection, transition: sentences of its output by kind.
    """

    steered_tokens: int
    execution: int
    reflection: int
    transition: int


class SteeringController:
    """Says where a request's steering starts and counts its thoughts.

    Args:
        tables: of the tokenizer.
        interval: positions after which the number of thoughts is taken over.
        counts_prompt: the published code's rule: the prompt's sentences count, and its last token may be steered.
    """

    def __init__(self, tables: ThoughtTables, interval: int, counts_prompt: bool) -> None:
        self._tables = tables
        self._interval = interval
        self._counts_prompt = counts_prompt
        self._track = ops.function("track_thoughts", torch.device("cpu"))

    def first(self, num_prompt: int) -> int:
        """Position of the first token that may be steered; what comes before is any request's."""
        return num_prompt - self._counts_prompt

    def start(self, request_id: str, prompt: Sequence[int], vector: int, strength: Strength) -> SteeredRequest:
        """Read the prompt: does the model think when it starts to write?

        Args:
            request_id: its id.
            prompt: token ids.
            vector: row of its vector, from 1; 0 steers nothing and counts all the same.
            strength: its coefficients.
        """
        first = self.first(len(prompt))
        read = self._run([0] * len(ops.STATE), prompt[:first], 0, Strength(0, 0, 0), NEVER)
        kept = read if self._counts_prompt else {"thinking": read["thinking"]}
        state = [vector if column == "vector" else kept.get(column, 0) for column in ops.STATE]
        return SteeredRequest(request_id, first, state, strength)

    def finish(self, start: SteeredRequest, token_ids: Sequence[int]) -> Thoughts:
        """Count what came of it.

        Args:
            start: where it began.
            token_ids: prompt and output, without what was sampled last, which the model never read.
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
