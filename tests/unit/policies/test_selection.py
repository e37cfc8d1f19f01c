"""Selection: exact counts, pins, ties, and whole sentences."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.policies.selection import select_per_head, select_sentences


def kept_of(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# ---- granularity "head"


def test_every_head_keeps_its_own_best_tokens():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    kept = select_per_head(scores, torch.zeros_like(scores, dtype=torch.bool), 2)
    assert kept.tolist() == [[[True, False, True, False], [False, False, True, True]]]


def test_pinned_tokens_stay_whatever_their_score():
    scores = torch.tensor([[[-9.0, 5.0, 4.0, 3.0, -torch.inf]]])
    pinned = torch.tensor([[[True, False, False, False, True]]])
    assert kept_of(select_per_head(scores, pinned, 3)[0, 0]) == [0, 1, 4]


def test_of_equal_scores_the_earlier_token_stays():
    scores = torch.tensor([[[1.0, 0.0, 1.0, 1.0, 1.0]]])
    assert kept_of(select_per_head(scores, torch.zeros(1, 1, 5, dtype=torch.bool), 2)[0, 0]) == [0, 2]
    # Also in rows so long that an unstable sort would not be stable by chance.
    same = torch.zeros(2, 3, 5000)
    kept = select_per_head(same, torch.zeros_like(same, dtype=torch.bool), 1234)
    assert torch.equal(kept, (torch.arange(5000) < 1234).expand(2, 3, -1))


small_scores = st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_per_head_selection_is_the_stable_top(data):
    layers, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 30))
    num_keep = data.draw(st.integers(1, length))
    rows = [
        [data.draw(st.lists(small_scores, min_size=length, max_size=length)) for _ in range(heads)]
        for _ in range(layers)
    ]
    pins = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=num_keep)))
    pinned = torch.zeros(layers, heads, length, dtype=torch.bool)
    pinned[..., pins] = True
    kept = select_per_head(torch.tensor(rows), pinned, num_keep)
    for layer in range(layers):
        for head in range(heads):
            free = [i for i in range(length) if i not in pins]
            best = sorted(free, key=lambda i: (-rows[layer][head][i], i))[: num_keep - len(pins)]
            assert kept_of(kept[layer, head]) == sorted(pins + best)


# ---- granularity "sentence"


def test_whole_sentences_leave_lowest_mean_first():
    # Sentences 1 (0-2), 2 (3-4), 3 (5-7). Means: 1.0, 0.5, 2.0.
    sentence = torch.tensor([1, 1, 1, 2, 2, 3, 3, 3])
    scores = torch.tensor([[[0.0, 0.0, 3.0, 0.5, 0.5, 2.0, 2.0, 2.0]]])
    pinned = torch.zeros(8, dtype=torch.bool)
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), pinned, sentence, 6)) == [0, 1, 2, 5, 6, 7]
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), pinned, sentence, 3)) == [5, 6, 7]


def test_the_marginal_sentence_is_cut_from_its_start():
    sentence = torch.tensor([1, 1, 1, 2, 2, 3, 3, 3])
    scores = torch.tensor([[[0.0, 0.0, 3.0, 0.5, 0.5, 2.0, 2.0, 2.0]]])
    # Sentence 2 leaves as a whole, then the first token of sentence 1, although its third token scores highest.
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), torch.zeros(8, dtype=torch.bool), sentence, 5)) == [
        1,
        2,
        5,
        6,
        7,
    ]


def test_of_equal_sentences_the_earlier_leaves_first():
    sentence = torch.tensor([1, 1, 2, 2, 3, 3])
    scores = torch.zeros(2, 2, 6)
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), torch.zeros(6, dtype=torch.bool), sentence, 3)) == [
        3,
        4,
        5,
    ]


def test_scores_are_averaged_over_layers_and_heads():
    sentence = torch.tensor([1, 2])
    scores = torch.tensor([[[5.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 4.0]]])  # means 1.25 and 2
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), torch.zeros(2, dtype=torch.bool), sentence, 1)) == [1]


def test_pinned_tokens_do_not_count_for_their_sentence_and_stay():
    sentence = torch.tensor([1, 1, 2, 2])
    scores = torch.tensor([[[100.0, 0.0, 1.0, 1.0]]])
    pinned = torch.tensor([True, False, False, False])
    # Without its pinned token, sentence 1 is worth 0 and goes first; the pinned token stays.
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), pinned, sentence, 3)) == [0, 2, 3]


def test_parts_of_a_sentence_left_by_earlier_evictions_count_as_held():
    # Sentence numbers of the held tokens only: the mean is over held tokens.
    sentence = torch.tensor([1, 4, 4, 9])
    scores = torch.tensor([[[2.0, 1.0, 1.0, 3.0]]])
    assert kept_of(select_sentences(scores.mean(dim=(0, 1)), torch.zeros(4, dtype=torch.bool), sentence, 2)) == [0, 3]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sentence_selection_is_the_loop(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    sentence = [number for number, size in enumerate(lengths) for _ in range(size)]
    length = len(sentence)
    num_keep = data.draw(st.integers(1, length))
    # Halves: sums and means of two layers and heads are exact, so ties are ties.
    values = [data.draw(st.lists(st.integers(-2, 2), min_size=length, max_size=length)) for _ in range(4)]
    pins = data.draw(st.sets(st.integers(0, length - 1), max_size=num_keep))
    scores = torch.tensor(values, dtype=torch.float32).view(2, 2, length)
    pinned = torch.tensor([i in pins for i in range(length)])
    kept = kept_of(select_sentences(scores.mean(dim=(0, 1)), pinned, torch.tensor(sentence), num_keep))

    worth = {}
    for number in range(len(lengths)):
        tokens = [i for i in range(length) if sentence[i] == number and i not in pins]
        if tokens:
            worth[number] = torch.tensor(sum(sum(row[i] for row in values) / 4 for i in tokens) / len(tokens)).item()
    leaving = length - num_keep
    gone: list[int] = []
    for number in sorted(worth, key=lambda n: (worth[n], n)):
        tokens = [i for i in range(length) if sentence[i] == number and i not in pins]
        gone += tokens[: leaving - len(gone)]
    assert kept == [i for i in range(length) if i not in gone]
    assert len(kept) == num_keep
