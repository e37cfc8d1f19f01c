"""Sentences of a chain of thought: where they end, what kind they are, how similar they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .tables import SentenceTables, Tokenizer, build_tables

__all__ = ["Sentence", "SentenceTables", "build_tables", "segment", "segment_with"]


class Sentence(NamedTuple):
    """One closed sentence: tokens `[start, end)`, the delimiter included."""

    start: int
    end: int
    is_execution: bool
    """False for a verification or change of approach ("Wait", "Alternatively", "again")."""


@lru_cache(maxsize=8)
def _cached_tables(tokenizer: Tokenizer, compat: str) -> SentenceTables:
    return build_tables(tokenizer, compat)


def segment(token_ids: Sequence[int], tokenizer: Tokenizer, *, compat: str = "default") -> list[Sentence]:
    """Split token ids into sentences.

    Args:
        token_ids: any text in the tokenizer's ids.
        tokenizer: the Hugging Face tokenizer they come from.
        compat: "default" or "published", see `sentences.tables`.

    Returns:
        The closed sentences in order. They tile the text; tokens after the last delimiter belong to none.
    """
    return segment_with(token_ids, _cached_tables(tokenizer, compat))  # type: ignore[arg-type]


def segment_with(token_ids: Sequence[int], tables: SentenceTables) -> list[Sentence]:
    """`segment` with ready-made tables."""
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
