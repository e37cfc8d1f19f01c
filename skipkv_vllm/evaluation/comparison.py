"""Compare a method's log probabilities with full KV's, position by position, and summarise over texts.

Row i of a text's scores is about token i + 1, predicted from the cache as it was when token i was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Scores
from .stats import bootstrap_mean, paired_difference

BINS = 16
"""Bins of the distance from the last compaction."""


@dataclass(frozen=True)
class Positions:
    """The effect of eviction at every position of a text; n - 1 rows.

    Attributes:
        nll: float32, negative log probability of the next token, in nats.
        full_nll: float32, the same with full KV.
        agrees: bool, whether the most likely token is the same.
        divergence: float32, see `divergence`.
    """

    nll: np.ndarray
    full_nll: np.ndarray
    agrees: np.ndarray
    divergence: np.ndarray

    @classmethod
    def compare(cls, full: Scores, scores: Scores) -> Positions:
        """Compare the scores of a text with those of full KV."""
        return cls(
            -scores.logprobs[:, 0],
            -full.logprobs[:, 0],
            scores.tokens[:, 1] == full.tokens[:, 1],
            divergence(full, scores),
        )


def divergence(full: Scores, scores: Scores) -> np.ndarray:
    """Return the Kullback-Leibler divergence of the distribution from full KV's, float32 `[n - 1]`, in nats.

    The classes are the tokens in both lists of most likely tokens, the next token of the text, and one class for all
    others. vLLM returns no probability for a token outside the list, and merging classes can only lower the
    divergence, so this is a lower bound on the divergence over the vocabulary.
    """
    full_log, full_tokens, full_counts = _classes(full)
    log, tokens, counts = _classes(scores)
    same = (full_tokens[:, :, None] == tokens[:, None, :]) & full_counts[:, :, None] & counts[:, None, :]
    shared = same.any(-1)
    other = np.where(same, log[:, None, :], 0.0).sum(-1)
    p, q = np.where(shared, np.exp(full_log), 0.0), np.where(shared, np.exp(other), 0.0)
    rest_p, rest_q = (np.clip(1.0 - each.sum(-1), 1e-9, None) for each in (p, q))
    total = np.where(shared, p * (full_log - other), 0.0).sum(-1) + rest_p * np.log(rest_p / rest_q)
    return np.clip(total, 0.0, None).astype(np.float32)


def _classes(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log probabilities, token ids, and which of them count; the next token counts only once."""
    counts = np.ones(scores.tokens.shape, bool)
    counts[:, 0] = ~(scores.tokens[:, 1:] == scores.tokens[:, :1]).any(-1)
    # The next token's probability is known on both sides, whether or not it is among the most likely.
    tokens = np.where(counts, scores.tokens, -1)
    return scores.logprobs.astype(np.float64), tokens, counts


def first_changed(num_tokens: int, bound: int) -> int:
    """Return the first row that a compaction can change; 0 if the text is too short for a compaction.

    A text without a compaction is compared from its beginning, and must not differ.
    """
    return bound if bound < num_tokens - 1 else 0


def distance_bins(num_rows: int, bound: int, buffer: int) -> np.ndarray:
    """Return the bin (of `BINS`) of each row's distance from the last compaction; int64, for rows from `bound` on."""
    return np.arange(max(0, num_rows - bound)) % buffer * min(BINS, buffer) // buffer


def summarise(
    compared: Sequence[Positions], sources: Sequence[str], compactions: Sequence[int], bound: int, buffer: int
) -> dict[str, Any]:
    """Summarise a method at a budget over texts; all but distances are means over texts of means over positions.

    Args:
        compared: one per text.
        sources: source of each text.
        compactions: number of compactions of each text.
        bound: tokens at which the first compaction takes place.
        buffer: tokens from one compaction to the next.

    Returns:
        `nll`, `full_nll`, `excess` and `divergence` in nats per token, `agreement` as a share, each of the last three
        with a 95 % interval by bootstrap over texts; `by_source`: source -> excess; `by_distance`: excess in each bin
        of the distance from the last compaction over all positions, empty if no text was compacted.
    """
    cut = [slice(first_changed(len(each.nll) + 1, bound), None) for each in compared]
    nll = [_mean(each.nll[at]) for each, at in zip(compared, cut, strict=True)]
    full = [_mean(each.full_nll[at]) for each, at in zip(compared, cut, strict=True)]
    agreement = [_mean(each.agrees[at]) for each, at in zip(compared, cut, strict=True)]
    kl = [_mean(each.divergence[at]) for each, at in zip(compared, cut, strict=True)]
    excess = paired_difference(nll, full)
    by_source: dict[str, list[float]] = {}
    for source, own, whole in zip(sources, nll, full, strict=True):
        by_source.setdefault(source, []).append(own - whole)
    return {
        "texts": len(compared),
        "positions": sum(len(each.nll[at]) for each, at in zip(compared, cut, strict=True)),
        "compactions": _mean(compactions),
        "nll": _mean(nll),
        "full_nll": _mean(full),
        "excess": excess.value,
        "excess_interval": [excess.low, excess.high],
        "agreement": _mean(agreement),
        "agreement_interval": list(bootstrap_mean(agreement)),
        "divergence": _mean(kl),
        "divergence_interval": list(bootstrap_mean(kl)),
        "by_source": {source: _mean(values) for source, values in by_source.items()},
        "by_distance": _by_distance(compared, bound, buffer),
    }


def _by_distance(compared: Sequence[Positions], bound: int, buffer: int) -> list[float]:
    bins = [distance_bins(len(each.nll), bound, buffer) for each in compared]
    number = np.concatenate(bins)
    if not len(number):
        return []
    excess = np.concatenate([(each.nll - each.full_nll)[bound:] for each in compared])
    return [float(excess[number == i].mean(dtype=np.float64)) for i in range(number.max() + 1)]


def _mean(values: Any) -> float:
    return float(np.mean(np.asarray(values, np.float64)))
