"""How strongly each token is steered, computed from the text alone."""

from __future__ import annotations

import itertools

from tests.reference.model import Model
from tests.reference.sentences import split_sentences
from tests.reference.settings import Steering


def alpha_at(model: Model, text: list[int], num_prompt: int, position: int, steering: Steering) -> float:
    """Strength of the vector at a position, from the text alone."""
    by_code = steering.compat != "default"
    first = num_prompt - 1 if by_code else num_prompt
    read = [model.texts[token] for token in text[: position + 1]]
    markers = [token for token in read if token in ("<think>", "</think>")]
    if position < first or "\n\n" not in read[-1] or markers[-1:] != ["<think>"]:
        return 0.0
    # N is updated after positions whose successor is a multiple of the interval, and not while the prompt is read.
    taken = [p for p in range(first, position) if (p + 1) % steering.interval == 0]
    num_doubts = 0
    if taken:
        num_doubts = count_doubts(model, text[0 if by_code else num_prompt : taken[-1] + 1], by_code)
    return min(steering.alpha0 + steering.gamma * num_doubts, steering.alpha_max)


def count_doubts(model: Model, text: list[int], by_code: bool) -> int:
    """Number of closed sentences with a word of doubt."""
    words = ("Wait", "Alternatively", "again")

    def ids(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    if by_code:
        enders = {ids(t)[-1] for t in ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")}
        found = [ids(word)[-1:] for word in words]
        starts = [0] + [i + 1 for i, token in enumerate(text) if token in enders]
        spans = list(itertools.pairwise(starts))
    else:
        found = [
            ids(space + form) for word in words for form in (word, word.lower(), word.title()) for space in ("", " ")
        ]
        spans = [(s.start, s.end) for s in split_sentences(text, 0, model.delimiters)[0]]
    return sum(any(_contains(text[start:end], word) for word in found) for start, end in spans)


def _contains(text: list[int], word: list[int]) -> bool:
    return any(text[i : i + len(word)] == word for i in range(len(text) - len(word) + 1))
