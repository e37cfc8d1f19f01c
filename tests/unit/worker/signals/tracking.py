"""Texts for the sentence tracker, and its expected results."""

from __future__ import annotations

import random
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skipkv_vllm.sentences import SentenceTables, split_sentences
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens
from tests.unit.sentences.tokenizers import DOT, NL, OF, WAIT, A

HIDDEN = 6
FOREVER = torch.iinfo(torch.int32).max


class Text(NamedTuple):
    """A request as the tracker must see it."""

    first: int
    tokens: list[int]
    hidden: Tensor


def make_text(seed: int, length: int, first: int = 0) -> Text:
    """Return random tokens and hidden states; each sentence has one of three topics, so that some repeat."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    topics = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens = [chance.choice([A, OF, 3, 4, WAIT, DOT, DOT, NL]) for _ in range(length)]
    topic, rows = 0, []
    for token in tokens:
        rows.append(topics[topic] + 0.05 * torch.randn(HIDDEN, generator=generator))
        if token in (DOT, NL):
            topic = chance.randrange(3)
    return Text(first, tokens, torch.stack(rows) if rows else torch.zeros(0, HIDDEN))


class MakeTracker(Protocol):
    def __call__(
        self, tables: SentenceTables = ..., hidden: int = ..., slots: int = ..., keeps_text: bool = ..., **options: Any
    ) -> SentenceTracker: ...


def feed(tracker: SentenceTracker, parts: list[tuple[int, Text, int, int]]) -> None:
    """Run one step: tokens `[start, end)` of each text, counted from its first tracked token."""
    counts = torch.tensor([end - start for _, _, start, end in parts])
    tracker.update(
        TrackedTokens(
            token_ids=torch.tensor([t for _, text, start, end in parts for t in text.tokens[start:end]]),
            spans=torch.stack(
                [
                    torch.tensor([slot for slot, *_ in parts]),
                    counts.cumsum(0) - counts,
                    counts,
                    torch.tensor([text.first + start for _, text, start, _ in parts]),
                ]
            ),
            num_tokens=int(counts.sum()),
            hidden=torch.cat([text.hidden[start:end] for _, text, start, end in parts])
            if tracker.has_embeddings
            else None,
        )
    )


def expected_ends(text: Text, tables: SentenceTables) -> list[int]:
    return [text.first + s.end - 1 for s in split_sentences(text.tokens, tables)]


def expected_embeddings(text: Text, tables: SentenceTables) -> Tensor:
    """Normalised mean hidden state up to and including the first delimiter of each sentence."""
    rows = []
    for sentence in split_sentences(text.tokens, tables):
        end = next(i for i in range(sentence.start, sentence.end) if text.tokens[i] in tables.delimiters) + 1
        mean = text.hidden[sentence.start : end].double().mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows).float() if rows else torch.zeros(0, HIDDEN)


def pair_penalties(embeddings: Tensor, threshold: float, rule: str) -> list[float]:
    result = []
    for i in range(len(embeddings)):
        cosines = [float(embeddings[i] @ embeddings[j]) for j in range(i + 1, len(embeddings))]
        above = [c for c in cosines if c > threshold]
        result.append(0.0 if not above else max(above) if rule == "max" else above[-1])
    return result
