"""The sentence tracker against direct computation, whatever the steps that bring the text."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.sentences import split_sentences
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from tests.unit.sentences.tokenizers import DOT, NL, PUBLISHED, TABLES
from tests.unit.worker.signals.tracking import (
    FOREVER,
    HIDDEN,
    Text,
    expected_embeddings,
    expected_ends,
    feed,
    make_text,
    pair_penalties,
)


def assert_state(tracker: SentenceTracker, slot: int, text: Text) -> None:
    """Check that the tracker knows exactly the sentences of the text."""
    tables = tracker.tables
    ends = expected_ends(text, tables)
    state = tracker.state(slot)
    assert state.first == text.first
    assert state.ends[: len(ends)].tolist() == ends
    assert (state.ends[len(ends) :] == FOREVER).all()
    if not tracker.has_embeddings:
        assert not state.penalties.any()
        return
    embeddings = expected_embeddings(text, tables)
    torch.testing.assert_close(tracker._embeddings[slot, : len(ends)], embeddings, rtol=1e-4, atol=1e-5)
    wanted = pair_penalties(embeddings, tracker.options.similarity_threshold, tables.penalty_rule)
    torch.testing.assert_close(state.penalties[: len(ends)], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert not state.penalties[len(ends) :].any()


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(6))
def test_one_request_in_one_step(make_tracker, seed, tables):
    tracker, text = make_tracker(tables), make_text(seed, 60)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 60)])
    assert any(tracker.state(0).penalties > 0), "the example must repeat a sentence"
    assert_state(tracker, 0, text)


@pytest.mark.parametrize("hidden", [HIDDEN, 0], ids=["embeddings", "ends only"])
@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_of_several_requests_gives_the_same_state(make_tracker, seed, tables, hidden):
    chance = random.Random(seed)
    tracker = make_tracker(tables, hidden)
    chosen = {
        slot: make_text(100 * seed + slot, chance.randint(1, 80), first=chance.choice([0, 5])) for slot in (2, 0, 3)
    }
    for slot, text in chosen.items():
        tracker.reset(slot, text.first)
    done = dict.fromkeys(chosen, 0)
    while any(done[slot] < len(text.tokens) for slot, text in chosen.items()):
        parts = []
        for slot, text in chosen.items():
            left = len(text.tokens) - done[slot]
            if left and chance.random() < 0.8:
                count = min(left, chance.choice([1, 1, 1, 2, 5, 30]))
                parts.append((slot, text, done[slot], done[slot] + count))
                done[slot] += count
        if parts:
            chance.shuffle(parts)
            feed(tracker, parts)
        if chance.random() < 0.2:
            # Reading must not change later results.
            for slot in chosen:
                tracker.state(slot)
    for slot, text in chosen.items():
        assert_state(tracker, slot, text)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([3, DOT, NL]), min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 29)),
    merges=st.booleans(),
)
def test_delimiters_at_every_step_border(make_tracker, tokens, cuts, merges):
    hidden = torch.randn(len(tokens), HIDDEN, generator=torch.Generator().manual_seed(len(tokens)))
    text = Text(0, tokens, hidden)
    tracker = make_tracker(TABLES if merges else PUBLISHED)
    tracker.reset(1, 0)
    borders = [0, *sorted(c for c in cuts if c < len(tokens)), len(tokens)]
    for start, end in itertools.pairwise(borders):
        feed(tracker, [(1, text, start, end)])
    assert_state(tracker, 1, text)


def test_reset_forgets_everything(make_tracker):
    tracker = make_tracker()
    tracker.reset(0, 0)
    # Ends in the middle of a sentence; in row 1 right after a delimiter.
    old, other = make_text(1, 50), Text(0, [3, DOT], torch.ones(2, HIDDEN))
    feed(tracker, [(0, old, 0, 50), (1, other, 0, 2)])
    tracker.state(0)
    for slot in (0, 1):
        tracker.reset(slot, 7)
        text = Text(7, [NL, 3, 4, DOT, 3], torch.randn(5, HIDDEN))
        feed(tracker, [(slot, text, 0, 5)])
        assert_state(tracker, slot, text)


def test_reset_leaves_other_slots_alone(make_tracker):
    tracker, text = make_tracker(), make_text(3, 40)
    tracker.reset(0, 0)
    tracker.reset(1, 0)
    feed(tracker, [(0, text, 0, 40), (1, text, 0, 40)])
    tracker.reset(1, 0)
    assert_state(tracker, 0, text)
    assert (tracker.state(1).ends == FOREVER).all()


@pytest.mark.parametrize("tables", [TABLES, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("seed", range(4))
def test_only_the_newest_embeddings_are_compared_and_old_penalties_stay(make_tracker, seed, tables):
    kept = 5
    tracker, text = make_tracker(tables, max_sentences=kept), make_text(seed, 90)
    tracker.reset(0, 0)
    embeddings = expected_embeddings(text, tables)
    known = [0.0] * len(embeddings)
    for start in range(0, 90, 6):
        feed(tracker, [(0, text, start, start + 6)])
        closed = len(split_sentences(text.tokens[: start + 6], tables))
        oldest = max(0, closed - kept)
        fresh = pair_penalties(embeddings[oldest:closed], 0.9, tables.penalty_rule)
        for i, value in enumerate(fresh, start=oldest):
            known[i] = max(known[i], value) if tables.penalty_rule == "max" else value or known[i]
        state = tracker.state(0)
        torch.testing.assert_close(state.penalties[:closed], torch.tensor(known[:closed]), rtol=1e-4, atol=1e-5)
    assert state.ends[:closed].tolist() == expected_ends(text, tables)
    assert sum(value > 0 for value in known[: closed - kept]) >= 1, "an old sentence must keep a penalty"


@pytest.mark.parametrize("threads", [1, 2])
def test_one_step_that_closes_more_sentences_than_are_kept(backend, threads):
    # A long prompt chunk, so large that PyTorch shares the work among threads: of two writes to the
    # same entry, that of the later sentence need not be the last one.
    kept, count, size = 16, 1200, 512
    tracker = SentenceTracker(
        TABLES,
        SentenceOptions(max_sentences=kept),
        num_rows=1,
        max_length=2 * count,
        hidden_size=size,
        vocab_size=20,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    hidden = torch.randn(2 * count, size, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.normalize(hidden.view(count, 2, size).mean(1), dim=-1)[-kept:]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            tracker.reset(0, 0)
            feed(tracker, [(0, Text(0, [3, DOT] * count, hidden), 0, 2 * count)])
            held = torch.stack([tracker._embeddings[0, number % kept] for number in range(count - kept, count)])
            torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_more_embeddings_than_tokens_fit(make_tracker):
    tracker, text = make_tracker(max_sentences=4096), make_text(5, 90)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 90)])
    assert_state(tracker, 0, text)


def test_a_sequence_of_delimiters_alone_fills_the_table(make_tracker):
    # As many sentences as tokens fit: the last usable entry must differ from the discarded one.
    tracker = make_tracker(PUBLISHED)
    text = Text(0, [DOT] * 100, torch.randn(100, HIDDEN))
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 100)])
    assert tracker.state(0).ends[:100].tolist() == list(range(100))


def test_sentence_numbers_and_penalties_of_positions(make_tracker):
    tracker = make_tracker()
    a, b = torch.eye(HIDDEN)[0], torch.eye(HIDDEN)[1]
    # Tracked from position 4: sentences 4-5 (a), 6-8 (b), 9-10 (a), open 11.
    text = Text(4, [3, DOT, 3, 3, DOT, 3, DOT, 3], torch.stack([a, a, b, b, b, a, a, b]))
    tracker.reset(0, 4)
    feed(tracker, [(0, text, 0, 8)])
    state = tracker.state(0)
    positions = torch.tensor([[0, 3, 4, 5, 6, 8], [9, 10, 11, 12, 4, 7]], dtype=torch.int32)
    assert state.sentence_of(positions).tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 1, 2]]
    penalties = tracker.penalties(torch.tensor([0]), positions[None, None], torch.tensor([100]), 100)[0, 0]
    torch.testing.assert_close(
        penalties, torch.tensor([[0.0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]), rtol=1e-5, atol=1e-5
    )


def test_penalty_and_numbers_without_any_closed_sentence(make_tracker):
    tracker = make_tracker()
    tracker.reset(0, 2)
    state = tracker.state(0)
    assert state.sentence_of(torch.tensor([0, 2, 50])).tolist() == [0, 1, 1]
    positions = torch.tensor([[[[0, 2, 50]]]], dtype=torch.int32)
    assert tracker.penalties(torch.tensor([0]), positions, torch.tensor([3]), 3).tolist() == [[[[0.0, 0.0, 0.0]]]]


def test_similar_pairs_are_the_pairs_above_the_threshold(make_tracker):
    tracker, text = make_tracker(), make_text(2, 60)
    tracker.reset(0, 0)
    feed(tracker, [(0, text, 0, 60)])
    embeddings = expected_embeddings(text, TABLES)
    wanted = {
        (i, j): float(embeddings[i] @ embeddings[j])
        for i in range(len(embeddings))
        for j in range(i + 1, len(embeddings))
        if embeddings[i] @ embeddings[j] > 0.9
    }
    pairs, cosines = tracker.similar_pairs(0)
    got = dict(zip(map(tuple, pairs.tolist()), cosines.tolist(), strict=True))
    assert wanted
    assert got == pytest.approx(wanted, rel=1e-4)
