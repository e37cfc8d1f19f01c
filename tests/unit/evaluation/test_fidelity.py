"""Statistics of fidelity."""

from __future__ import annotations

import numpy as np
import pytest

from skipkv_vllm.evaluation.comparison import Positions, distance_bins, divergence, first_changed, summarise
from skipkv_vllm.evaluation.engine import Scores


def scores_of(logits: np.ndarray, following: np.ndarray, top: int) -> Scores:
    """Return the scores that vLLM would return for logits `[rows, vocabulary]`."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)[:, :top]
    tokens = np.concatenate([following[:, None], best], axis=1)
    return Scores(tokens.astype(np.int32), np.take_along_axis(logprobs, tokens, 1).astype(np.float32))


def random_scores(seed: int, rows: int = 50, vocabulary: int = 40, top: int = 20) -> tuple[Scores, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(rows, vocabulary))
    return scores_of(logits, np.random.default_rng(0).integers(0, vocabulary, rows), top), logits


def test_nothing_changed_is_exactly_zero():
    scores, _ = random_scores(1)
    same = Positions.compare(scores, scores)
    assert (same.nll == same.full_nll).all()
    assert same.agrees.all()
    assert (same.divergence == 0).all()


def test_the_divergence_is_exact_over_a_whole_vocabulary():
    (full, a), (other, b) = random_scores(1, top=40), random_scores(2, top=40)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(divergence(full, other), (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_the_divergence_of_lists_is_that_of_merged_classes():
    (full, a), (other, b) = random_scores(1), random_scores(2)
    for row, found in enumerate(divergence(full, other)):
        p, q = (np.exp(x[row]) / np.exp(x[row]).sum() for x in (a, b))
        # Both contain the following token.
        known = set(full.tokens[row]) & set(other.tokens[row])
        rest = [i for i in range(len(p)) if i not in known]
        expected = sum(p[i] * np.log(p[i] / q[i]) for i in known)
        expected += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found <= (p * np.log(p / q)).sum() + 1e-5


def test_rows_count_from_the_first_compaction_on():
    # Token 20 is the first one computed on a compacted cache; its row predicts token 21.
    assert first_changed(100, 20) == 20
    # A text without a compacted prediction is compared as a whole.
    assert first_changed(21, 20) == 0
    assert first_changed(22, 20) == 20


def test_distances_start_over_at_every_compaction():
    assert distance_bins(20 + 8, 20, 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert distance_bins(128 + 128, 128, 128).tolist() == [i // 8 for i in range(128)]
    assert distance_bins(10, 20, 4).tolist() == []


def positions(excess: list[float], full: float = 1.0) -> Positions:
    nll = np.array([full + each for each in excess], np.float32)
    count = len(excess)
    return Positions(nll, np.full(count, full, np.float32), np.array(excess) == 0, nll - full)


def test_figures_are_means_over_texts():
    texts = [positions([0, 0, 0, 0, 0.5, 0.5, 1.0, 1.0]), positions([9, 9, 9, 9, 0, 0, 0.5, 0.5])]
    found = summarise(texts, ["a", "b"], [1, 3], bound=4, buffer=4)
    assert found["positions"] == 8
    assert found["excess"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["by_source"] == pytest.approx({"a": 0.75, "b": 0.25})
    assert found["agreement"] == pytest.approx((0 + 0.5) / 2)
    assert found["by_distance"] == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert found["compactions"] == 2
    low, high = found["excess_interval"]
    assert (low, high) == pytest.approx((0.25, 0.75))


def test_the_interval_is_of_paired_differences():
    # The texts differ far more than the methods.
    texts = [positions([0.1] * 8, full) for full in (1.0, 5.0, 9.0, 13.0)]
    low, high = summarise(texts, list("abcd"), [1] * 4, bound=4, buffer=4)["excess_interval"]
    assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-5)
