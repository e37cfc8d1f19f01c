"""Split token ids into sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .tables import SentenceTables


class Sentence(NamedTuple):
    """A closed sentence: tokens `[start, end)`, the delimiter included."""

    start: int
    end: int
    is_execution: bool
    """False for a verification or a change of approach ("Wait", "Alternatively", "again")"""


def split_sentences(token_ids: Sequence[int], tables: SentenceTables) -> list[Sentence]:
    """Split token ids into sentences.

    Args:
        token_ids: any text in the ids of the tokenizer.
        tables: tables of that tokenizer.

    Returns:
        The closed sentences in order. They follow one another without gaps; tokens after the last delimiter belong to
        no sentence.
    """
    sentences: list[Sentence] = []
    start = 0
    for i, token in enumerate(token_ids):
        if token not in tables.delimiters:
            continue
        if tables.merges_delimiters and sentences and start == i:
            sentences[-1] = sentences[-1]._replace(end=i + 1)
        else:
            text = tuple(token_ids[start : i + 1])
            sentences.append(Sentence(start, i + 1, not _contains_any(text, tables.keywords)))
        start = i + 1
    return sentences


def _contains_any(text: tuple[int, ...], keywords: tuple[tuple[int, ...], ...]) -> bool:
    return any(text[i : i + len(word)] == word for word in keywords for i in range(len(text) - len(word) + 1))
