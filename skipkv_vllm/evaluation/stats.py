"""Statistics of the reports: exact where possible, seeded where random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of means and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Return Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4)."""
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Return a percentile bootstrap interval of a mean over problems, one value per problem."""
    _, low, high = paired_difference(values, [0.0] * len(values), seed)
    return Interval(low, high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Difference:
    """Return the mean of `ours - theirs` over problems, with a percentile bootstrap over problems (Efron 1979).

    Args:
        ours, theirs: one value per problem, in the same order.
        seed: of the resampling.
    """
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    drawn = np.random.default_rng(seed).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), (2.5, 97.5))
    return Difference(float(differences.mean()), float(low), float(high))


def mcnemar(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the exact two-sided p-value of McNemar's test on paired right (1) or wrong (0) answers.

    This is the probability, if both are equally good, that the problems solved by only one of them are split at least
    as unevenly as observed (McNemar 1947, with the binomial distribution).
    """
    only_ours = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(a < b for a, b in zip(ours, theirs, strict=True))
    discordant = only_ours + only_theirs
    tail = sum(math.comb(discordant, i) for i in range(min(only_ours, only_theirs) + 1))
    return float(min(1.0, 2 * tail / 2**discordant))
