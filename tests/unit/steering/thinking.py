"""Texts with thoughts, and the expected strength at each token."""

from __future__ import annotations

import functools
import random
from typing import Any

from transformers import AutoTokenizer

from skipkv_vllm import bundled_model
from skipkv_vllm.core.orders import Strength
from skipkv_vllm.sentences import build_tables, split_sentences
from skipkv_vllm.steering.tables import ThoughtTables, build_thought_tables

STRENGTH = Strength(1.0, 0.25, 2.0)
WIDTH = 8


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled_model())


@functools.cache
def tables(compat: str = "default") -> ThoughtTables:
    return build_thought_tables(tokenizer(), 503, compat)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


MARKERS = ("<think>", "<think>", "</think>")
PIECES = ("Wait", " again", "Alternatively", "Read", " a", ".", ".\n\n", "\n\n", ".\n", "\n", ":", " ") * 3 + MARKERS


def random_text(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    text: list[int] = []
    while len(text) < length:
        text += ids(draw.choice(PIECES))
    return text[:length]


def naive_alphas(text: list[int], first: int, thinks: bool, interval: int, strength: Strength) -> list[float]:
    """Compute the rule for a text whose tokens count from position `first` on."""
    read = [tokenizer().decode([token]) for token in text]
    sentences = split_sentences(text[first:], build_tables(tokenizer()))
    doubts = [first + s.end for s in sentences if not s.is_execution]
    # A delimiter after another one moves the end of a sentence that was counted at the first one.
    body = {first + s.start: first + s.end for s in sentences}
    closed = []
    for start, end in body.items():
        at = next(p for p in range(start, end) if text[p] in build_tables(tokenizer()).delimiters)
        closed += [at] * (end in doubts)
    alphas, latched = [0.0] * len(text), 0
    for p in range(first, len(text)):
        thinks = {"<think>": True, "</think>": False}.get(read[p], thinks)
        if thinks and "\n\n" in read[p]:
            alphas[p] = min(strength.alpha0 + strength.gamma * latched, strength.alpha_max)
        if (p + 1) % interval == 0:
            latched = sum(at <= p for at in closed)
    return alphas
