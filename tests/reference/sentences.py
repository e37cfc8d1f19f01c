"""Sentences of a text, and how much each of them repeats others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Repeats of a sentence in the bundled model's thoughts have a cosine of 0.74 to 0.87.
SIMILAR_SENTENCES = 0.85
EPSILON = 1e-8


@dataclass
class Sentence:
    """Tokens `[start, end)`, of which those before `body_end` make up the embedding."""

    start: int
    body_end: int
    end: int


def split_sentences(token_ids: Sequence[int], first: int, delimiters: set[int]) -> tuple[list[Sentence], int]:
    """Closed sentences of `token_ids[first:]`, and where the open one starts."""
    closed: list[Sentence] = []
    start = first
    for position in range(first, len(token_ids)):
        if token_ids[position] not in delimiters:
            continue
        if closed and start == position:
            closed[-1].end = position + 1
        else:
            closed.append(Sentence(start, position + 1, position + 1))
        start = position + 1
    return closed, start


def sentence_penalties(sentences: list[Sentence], hidden: Tensor) -> list[float]:
    """Similarity of each sentence to the later one that is most like it, 0 if none is; hidden `[C, H]`."""
    if not sentences:
        return []
    means = torch.stack([hidden[s.start : s.body_end].mean(dim=0) for s in sentences])
    embeddings = means / (means.norm(dim=-1, keepdim=True) + EPSILON)
    cosine = (embeddings @ embeddings.T).triu(1)
    return torch.where(cosine > SIMILAR_SENTENCES, cosine, 0.0).amax(dim=-1).tolist()


def repeated_shares(text: Sequence[int], first: int, sentences: list[Sentence]) -> list[float]:
    """Share of each sentence's tokens inside runs of six tokens that occur again later in `text[first:]`."""
    last_start = {tuple(text[i : i + 6]): i for i in range(first, len(text) - 5)}
    repeated = set()
    for i in range(first, len(text) - 5):
        if last_start[tuple(text[i : i + 6])] > i:
            repeated.update(range(i, i + 6))
    return [sum(i in repeated for i in range(s.start, s.end)) / (s.end - s.start) for s in sentences]


def sentence_of_token(positions: Tensor, sentences: list[Sentence], open_start: int) -> Tensor:
    """Number of the sentence of each position `[held]`; -1 before the first, `len(sentences)` if open."""
    owner = torch.full_like(positions, -1)
    for number, sentence in enumerate(sentences):
        owner[(positions >= sentence.start) & (positions < sentence.end)] = number
    owner[positions >= open_start] = len(sentences)
    return owner
