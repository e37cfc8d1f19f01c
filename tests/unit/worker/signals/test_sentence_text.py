"""The tracker's text: repeated words of sentences, against direct computation."""

from __future__ import annotations

import random

import pytest
import torch

from skipkv_vllm.sentences import SentenceTables, split_sentences
from skipkv_vllm.sentences.recurrence import GRAM
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from tests.unit.sentences.tokenizers import DOT, NL, OF, PUBLISHED, TABLES, WAIT, A
from tests.unit.worker.signals.test_sentence_tracker import assert_state
from tests.unit.worker.signals.tracking import Text, feed


def worded_text(seed: int, length: int, first: int = 0) -> Text:
    """Return random tokens with stretches that repeat earlier ones."""
    chance = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < length:
        if tokens and chance.random() < 0.3:
            start = chance.randrange(len(tokens))
            tokens += tokens[start : start + chance.randint(8, 16)]
        else:
            tokens.append(chance.choice([A, OF, 3, 4, 5, 6, 7, WAIT, DOT, NL]))
    return Text(first, tokens[:length], torch.zeros(length, 0))


def shares_of(text: Text, tables: SentenceTables) -> list[float]:
    """Return by position the share of its sentence inside phrases that occur again later."""
    phrases = [tuple(text.tokens[i : i + GRAM]) for i in range(len(text.tokens) - GRAM + 1)]
    again = {i + k for i, phrase in enumerate(phrases) if phrase in phrases[i + 1 :] for k in range(GRAM)}
    shares = [0.0] * (text.first + len(text.tokens))
    for s in split_sentences(text.tokens, tables):
        share = sum(i in again for i in range(s.start, s.end)) / (s.end - s.start)
        shares[text.first + s.start : text.first + s.end] = [share] * (s.end - s.start)
    return shares


def repeats_of(text: Text, tables: SentenceTables) -> dict[tuple[int, int], float]:
    """Return pairs of closed sentences: each with the next one that repeats most of it, and the share."""
    sentences, counts = split_sentences(text.tokens, tables), {}
    closed = text.tokens[: sentences[-1].end] if sentences else []
    number = {i: n for n, s in enumerate(sentences) for i in range(s.start, s.end)}
    for i in range(len(closed) - GRAM + 1):
        later = (j for j in range(i + 1, len(closed) - GRAM + 1) if closed[j : j + GRAM] == closed[i : i + GRAM])
        if (j := next(later, None)) is not None:
            counts[number[i], number[j]] = counts.get((number[i], number[j]), 0) + 1
    found = {}
    for (earlier, later), count in counts.items():
        phrases = max(1, sentences[earlier].end - sentences[earlier].start - GRAM + 1)
        if earlier != later and count > phrases / 2:
            found[earlier, later] = min(1.0, count / phrases)
    return found


def assert_shares(tracker: SentenceTracker, texts: dict[int, Text]) -> None:
    """Check penalties by logical position, of several requests at once, each in two heads of different order."""
    lengths = [text.first + len(text.tokens) for text in texts.values()]
    longest = max(lengths)
    # Entries beyond a shorter request's tokens may have any value.
    positions = torch.randint(0, 5 * longest, (len(texts), 1, 2, longest), generator=torch.Generator().manual_seed(1))
    for row, length in zip(positions, lengths, strict=True):
        row[0, 0, :length], row[0, 1, :length] = torch.arange(length), torch.arange(length).flip(0)
    found = tracker.penalties(torch.tensor(list(texts)), positions.int(), torch.tensor(lengths), longest)
    assert found.shape == positions.shape
    for row, length, text in zip(found, lengths, texts.values(), strict=True):
        wanted = torch.tensor(shares_of(text, tracker.tables))
        torch.testing.assert_close(row[0, 0, :length], wanted)
        torch.testing.assert_close(row[0, 1, :length], wanted.flip(0))


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(8))
def test_shares_do_not_depend_on_the_steps_that_brought_the_text(make_tracker, seed, tables):
    """Chunks, single tokens, and steps of both; all requests differ in length and beginning."""
    chance = random.Random(seed)
    tracker = make_tracker(tables, keeps_text=True)
    texts = {
        slot: worded_text(10 * seed + slot, chance.randint(1, 90), first=chance.choice([0, 3, 9])) for slot in (3, 0, 2)
    }
    for slot, text in texts.items():
        tracker.reset(slot, text.first)
    done = dict.fromkeys(texts, 0)
    while any(done[slot] < len(text.tokens) for slot, text in texts.items()):
        parts, most = [], chance.choice([1, 1, 2, 30])
        for slot, text in texts.items():
            if (left := len(text.tokens) - done[slot]) and chance.random() < 0.8:
                count = min(left, chance.randint(1, most))
                parts.append((slot, text, done[slot], done[slot] + count))
                done[slot] += count
        if parts:
            chance.shuffle(parts)
            feed(tracker, parts)
    assert_shares(tracker, texts)
    assert any(share > 0 for text in texts.values() for share in shares_of(text, tables)), "nothing is repeated"
    for slot, text in texts.items():
        assert_state(tracker, slot, text)


def test_shares_grow_with_the_text(make_tracker):
    tracker, text = make_tracker(keeps_text=True), worded_text(3, 80, first=4)
    tracker.reset(1, 4)
    for i in range(80):
        feed(tracker, [(1, text, i, i + 1)])
        assert_shares(tracker, {1: Text(4, text.tokens[: i + 1], text.hidden)})


def test_a_row_forgets_the_words_of_its_last_request(make_tracker):
    """Old words stay in the buffer, before and behind the new ones; they must not count as repeats."""
    tracker, words = make_tracker(keeps_text=True), worded_text(5, 30).tokens
    old, other = Text(0, words * 3, torch.zeros(90, 0)), worded_text(6, 90)
    tracker.reset(2, 0)
    tracker.reset(3, 0)
    feed(tracker, [(2, old, 0, 90), (3, other, 0, 90)])
    for first in (0, 30):
        new = Text(first, words, torch.zeros(30, 0))
        tracker.reset(2, first)
        feed(tracker, [(2, new, 0, 30)])
        assert_shares(tracker, {2: new})
        assert_shares(tracker, {2: new, 3: other})
        assert_pairs(tracker, 2, new)


def assert_pairs(tracker: SentenceTracker, slot: int, text: Text) -> dict[tuple[int, int], float]:
    pairs, shares = tracker.similar_pairs(slot)
    assert (pairs.dtype, shares.dtype) == (torch.int64, torch.float32)
    wanted = repeats_of(text, tracker.tables)
    assert dict(zip(map(tuple, pairs.tolist()), shares.tolist(), strict=True)) == pytest.approx(wanted)
    return wanted


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
def test_similar_pairs_by_words(make_tracker, tables):
    found, sizes = 0, set()
    for seed in range(30):
        tracker, text = make_tracker(tables, keeps_text=True), worded_text(seed, 3 * seed + 1, first=seed % 3)
        tracker.reset(1, text.first)
        feed(tracker, [(1, text, 0, len(text.tokens))])
        pairs = assert_pairs(tracker, 1, text)
        found += len(pairs)
        sizes |= {share == 1 for share in pairs.values()}
    assert found > 10
    assert sizes == {True, False}, "both sentences must be repeated, one wholly and one in part"


def test_a_sentence_that_repeats_itself_is_no_pair(make_tracker):
    tracker, text = make_tracker(keeps_text=True), Text(0, [3, 4] * 8 + [DOT, 5, DOT], torch.zeros(19, 0))
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 19)])
    assert_shares(tracker, {0: text})
    assert shares_of(text, TABLES)[0] > 0.5
    assert len(tracker.similar_pairs(0)[0]) == 0


def test_similar_pairs_where_nothing_is_closed(make_tracker):
    tracker = make_tracker(keeps_text=True)
    tracker.reset(0, 5)
    assert tracker.similar_pairs(0)[0].shape == (0, 2)
    text = Text(5, [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4], torch.zeros(12, 0))
    feed(tracker, [(0, text, 0, 12)])
    assert tracker.similar_pairs(0)[0].shape == (0, 2)
    assert tracker.similar_pairs(0)[1].shape == (0,)


def test_text_and_embeddings_are_kept_only_where_they_are_compared(make_tracker):
    by_words, by_states, neither = make_tracker(keeps_text=True), make_tracker(), make_tracker(hidden=0)
    assert [tracker.compares for tracker in (by_words, by_states, neither)] == [True, True, False]
    # 4 bytes for each of 101 places of 4 rows.
    assert by_words.nbytes - neither.nbytes == 4 * 4 * 101
    assert by_states.nbytes > by_words.nbytes


def test_buffers_are_accounted_for(make_tracker):
    tracker = make_tracker(hidden=16, slots=2, max_sentences=8)
    # The embeddings alone: 2 requests, 8 + 1 rows, 16 floats.
    assert tracker.nbytes > 2 * 9 * 16 * 4
    assert make_tracker(hidden=0, slots=2).nbytes < tracker.nbytes
