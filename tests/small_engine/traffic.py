"""The requests of a run, and what their texts are: sampled, with sentences, some of which are repeated."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.small_engine.shape import DOT

SENTENCE = 9
"""Tokens of a sentence, its dot included."""
LAG = 4 * SENTENCE
"""A repeated stretch says again what was said that many tokens before."""


@dataclass(frozen=True)
class Arrival:
    """A request to come.

    Attributes:
        name: its id.
        prompt: its token ids.
        end: tokens computed when it ends.
        policy: its method; None for the server's own.
        parent: request with the same prompt, whose blocks it shares if they are still whole; None if there is none.
    """

    name: str
    prompt: list[int]
    end: int
    policy: str | None
    parent: str | None = None


@dataclass(frozen=True)
class Traffic:
    """How requests come.

    Attributes:
        policies: methods that they take in turn; None is the server's own.
        prompts: shortest and longest prompt.
        lengths: tokens computed when the shortest and the longest request end.
        shares: whether of every four requests the last three share the prompt of the first.
        preempt_every: steps after which a running request loses its cache and starts over; 0 for never.
        pause_every: period in steps; none comes in its second half, so that the batch shrinks. 0 for no pauses.
    """

    policies: tuple[str | None, ...] = (None,)
    prompts: tuple[int, int] = (8, 40)
    lengths: tuple[int, int] = (110, 230)
    shares: bool = False
    preempt_every: int = 0
    pause_every: int = 0

    def arrivals(self, number: int, vocabulary: int, seed: int) -> list[Arrival]:
        """Draw requests."""
        chance = random.Random(seed)
        found: list[Arrival] = []
        for i in range(number):
            prompt = [chance.randrange(10, vocabulary) for _ in range(chance.randint(*self.prompts))]
            prompt = [DOT if position % SENTENCE == SENTENCE - 1 else token for position, token in enumerate(prompt)]
            parent = None
            if self.shares and i % 4:
                parent, prompt = found[-1].parent or found[-1].name, found[-1].prompt
            policy = self.policies[i % len(self.policies)]
            end = max(chance.randint(*self.lengths), len(prompt) + 2)
            found.append(Arrival(f"request {i}", prompt, end, policy, parent))
        return found

    def allows_arrivals(self, step: int) -> bool:
        """Whether requests may come in this step."""
        return not self.pause_every or step % self.pause_every < self.pause_every // 2


def is_dot(position: int) -> bool:
    """Whether the token at this position ends a sentence."""
    return position % SENTENCE == SENTENCE - 1


def is_repeated(position: int) -> bool:
    """Whether the token at this position says again what was said `LAG` tokens before."""
    return position >= LAG and position // LAG % 2 == 1
