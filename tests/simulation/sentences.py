"""Sentences of a request and their penalties, from its text and hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import Need
from skipkv_vllm.sentences import split_sentences
from skipkv_vllm.sentences.recurrence import GRAM
from tests.simulation.model import DOT, TABLES
from tests.simulation.request import Running


class Sentences(NamedTuple):
    """Functions of a position.

    Attributes:
        number: number of its sentence; 0 before tracking starts.
        penalty: penalty of its sentence.
    """

    number: Callable[[int], int]
    penalty: Callable[[int], float]


def sentences_of(request: Running, config: KVPolicyConfig) -> Sentences:
    """Find a request's sentences and what each of them is penalised with."""
    text, first = request.tokens[request.first_tracked :], request.first_tracked
    found = split_sentences(text, TABLES)
    ends = [s.end + first for s in found]
    if config.needs & Need.RECURRENCE:
        grams = [tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)]
        again = {i + k for i, gram in enumerate(grams) if gram in grams[i + 1 :] for k in range(GRAM)}
        penalties = [sum(i in again for i in range(s.start, s.end)) / (s.end - s.start) for s in found]
    else:
        threshold = config.policy.sentence_options.similarity_threshold
        penalties = _similarities(request, [(s.start + first, s.end + first) for s in found], threshold)

    def number(position: int) -> int:
        if position < first:
            return 0
        return next((n + 1 for n, end in enumerate(ends) if position < end), len(ends) + 1)

    def penalty(position: int) -> float:
        n = number(position)
        return penalties[n - 1] if 0 < n <= len(penalties) else 0.0

    return Sentences(number, penalty)


def _similarities(request: Running, spans: list[tuple[int, int]], threshold: float) -> list[float]:
    """Of each sentence the cosine with the later one that is most like it, 0 where none is above the threshold."""
    unit = []
    for start, end in spans:
        stop = next(i for i in range(start, end) if request.tokens[i] == DOT) + 1
        mean = torch.stack(request.hidden[start:stop]).double().mean(0)
        unit.append(mean / mean.norm())
    penalties = []
    for i in range(len(unit)):
        cosines = [float(unit[i] @ unit[j]) for j in range(i + 1, len(unit))]
        penalties.append(max([c for c in cosines if c > threshold], default=0.0))
    return penalties
