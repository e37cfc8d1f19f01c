"""Repeated words: `sentences.recurrence` against a comparison of every phrase with every later one."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.sentences.recurrence import GRAM, next_occurrence, repeated_shares, repeated_tokens
from skipkv_vllm.worker.signals.sentence_tracker import OPEN

DOT = 0


def next_of(text: list[int]) -> list[int]:
    """Return for each place the next one at which the same `GRAM` tokens begin, or the length of the text."""
    found = []
    for i in range(len(text)):
        phrase = text[i : i + GRAM]
        again = (j for j in range(i + 1, len(text) - GRAM + 1) if text[j : j + GRAM] == phrase)
        found.append(next(again, len(text)) if len(phrase) == GRAM else len(text))
    return found


def said_again(text: list[int]) -> list[bool]:
    """Return whether each token is part of a phrase that occurs again later."""
    starts = [i for i, after in enumerate(next_of(text)) if after < len(text)]
    return [any(start <= i < start + GRAM for start in starts) for i in range(len(text))]


def shares_of(text: list[int], ends: list[int]) -> list[float]:
    """Return by token the repeated share of its sentence; 0 in the open sentence."""
    again, shares, begin = said_again(text), [0.0] * len(text), 0
    for end in ends:
        size = end + 1 - begin
        shares[begin : end + 1] = [sum(again[begin : end + 1]) / size] * size
        begin = end + 1
    return shares


def make_text(chance: random.Random, length: int, words: int) -> list[int]:
    """Return random tokens with stretches that repeat earlier ones."""
    text: list[int] = []
    while len(text) < length:
        if text and chance.random() < 0.3:
            start = chance.randrange(len(text))
            text += text[start : start + chance.randint(1, 20)]
        else:
            text += [chance.randrange(words) for _ in range(chance.randint(1, 12))]
    return text[:length]


def ends_of(text: list[int]) -> list[int]:
    return [i for i, token in enumerate(text) if token == DOT]


def laid_out(rows: list[tuple[int, list[int]]], width: int, chance: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Put texts that begin at given positions into one table of `width` tokens: ids, masks of text, and sentence ends.

    Outside the text, the row's own text continues, which a wrong read would take for a repeat.
    """
    ids = torch.zeros(len(rows), width, dtype=torch.int32)
    is_text = torch.zeros_like(ids, dtype=torch.bool)
    ends = torch.full((len(rows), width + 1), OPEN, dtype=torch.int32)
    for r, (first, text) in enumerate(rows):
        filler = [text[(i - first) % len(text)] if text else chance.randrange(3) for i in range(width)]
        ids[r] = torch.tensor(filler)
        is_text[r, first : first + len(text)] = True
        closed = [first + end for end in ends_of(text)]
        ends[r, : len(closed)] = torch.tensor(closed, dtype=torch.int32)
    return ids, is_text, ends


def check(rows: list[tuple[int, list[int]]], width: int, chance: random.Random) -> None:
    ids, is_text, ends = laid_out(rows, width, chance)
    tokens, shares = repeated_tokens(ids, is_text), repeated_shares(ids, is_text, ends)
    assert shares.dtype is torch.float32
    for r, (first, text) in enumerate(rows):
        behind = width - first - len(text)
        assert tokens[r].tolist() == [False] * first + said_again(text) + [False] * behind
        wanted = [0.0] * first + shares_of(text, ends_of(text)) + [0.0] * behind
        torch.testing.assert_close(shares[r], torch.tensor(wanted))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), words=st.sampled_from([1, 2, 3, 8, 150_000]))
def test_shares_of_random_texts(seed, words):
    """Several rows of any length and beginning; some are too short for a phrase or empty."""
    chance = random.Random(seed)
    width = chance.choice([1, 5, 6, 7, 40, 90])
    rows = []
    for _ in range(chance.randint(1, 4)):
        first = chance.randint(0, width)
        rows.append((first, make_text(chance, chance.randint(0, width - first), words)))
    check(rows, width, chance)


def test_the_examples_are_worth_something():
    """The texts above repeat in part, and have open and closed sentences."""
    chance, seen = random.Random(0), set()
    for _ in range(30):
        text = make_text(chance, 60, 8)
        shares = shares_of(text, ends_of(text))
        seen |= {"none" if x == 0 else "all" if x == 1 else "some" for x in shares}
    assert seen == {"none", "some", "all"}


@pytest.mark.parametrize("words", [1, 2, 7, 2**31 - 1])
@pytest.mark.parametrize("length", [0, 1, GRAM - 1, GRAM, GRAM + 1, 80])
def test_next_occurrence(length, words):
    chance = random.Random(length)
    rows = [make_text(chance, length, words) for _ in range(3)]
    found = next_occurrence(torch.tensor(rows, dtype=torch.int64).view(3, length))
    assert found.dtype is torch.int64
    assert found.tolist() == [next_of(row) for row in rows]


def test_rows_do_not_know_of_each_other():
    text = list(range(1, 21))
    assert (next_occurrence(torch.tensor([text, text])) == 20).all()


def test_a_table_without_tokens():
    ids = torch.zeros(2, 0, dtype=torch.int32)
    ends = torch.full((2, 4), OPEN, dtype=torch.int32)
    assert repeated_shares(ids, ids.bool(), ends).shape == (2, 0)


def test_a_sentence_said_again_is_repeated_and_its_repeat_is_not():
    sentence = [5, 6, 7, 8, 9, 10, 11, DOT]
    text = sentence + [1, 2, 3, DOT] + sentence + [4, 4, DOT, 5, 6]
    ids, is_text, ends = laid_out([(0, text)], len(text), random.Random(0))
    assert repeated_shares(ids, is_text, ends)[0].tolist() == [1.0] * 8 + [0.0] * 17


def test_a_number_changed_leaves_part_of_a_sentence_repeated():
    # Nine tokens after the changed word make four phrases.
    text = [1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, DOT] + [1, 2, 4, 10, 11, 12, 13, 14, 15, 16, 17, DOT]
    ids, is_text, ends = laid_out([(0, text)], len(text), random.Random(0))
    shares = repeated_shares(ids, is_text, ends)[0]
    torch.testing.assert_close(shares, torch.tensor([9 / 12] * 12 + [0.0] * 12))


def test_the_open_sentence_is_never_repeated_but_repeats():
    sentence = [5, 6, 7, 8, 9, 10]
    # The open sentence makes the closed one a repeat; its own repetitions leave the open one at 0.
    text = sentence + [DOT] + sentence + sentence
    ids, is_text, ends = laid_out([(0, text)], len(text), random.Random(0))
    shares = repeated_shares(ids, is_text, ends)[0]
    torch.testing.assert_close(shares, torch.tensor([6 / 7] * 7 + [0.0] * 12))
