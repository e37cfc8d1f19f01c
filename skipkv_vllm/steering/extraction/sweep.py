"""Choose the layer to steer from a grid of layers and strengths on development problems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...core.errors import KVPolicyError


class Outcome(NamedTuple):
    """Whether an answer is right, its length in tokens, and whether it was cut off."""

    correct: bool
    length: int
    truncated: bool


class Cell(NamedTuple):
    """A cell of the grid.

    Attributes:
        layer: the steered layer; None for the unsteered model.
        alpha0: strength; 0 for the unsteered model.
        accuracy, truncated: shares, from 0 to 1.
        mean_length: mean length in tokens.
    """

    layer: int | None
    alpha0: float
    accuracy: float
    mean_length: float
    truncated: float


def cell(layer: int | None, alpha0: float, outcomes: Sequence[Outcome]) -> Cell:
    """Average answers into a cell."""
    correct, lengths, truncated = zip(*outcomes, strict=True)
    count = len(outcomes)
    return Cell(layer, alpha0, sum(correct) / count, sum(lengths) / count, sum(truncated) / count)


def choose(plain: Cell, cells: Iterable[Cell], tolerance: float) -> Cell:
    """Return the cell with the shortest answers; its accuracy may be `tolerance` below that of the unsteered model.

    Ties go to the higher accuracy, then to the lower strength, then to the earlier layer.

    Raises:
        KVPolicyError: no such cell has shorter answers.
    """
    good = [c for c in cells if c.accuracy >= plain.accuracy - tolerance and c.mean_length < plain.mean_length]
    if not good:
        raise KVPolicyError(
            f"no layer and strength shortened the answers ({plain.mean_length:.0f} tokens) at an accuracy within "
            f"{100 * tolerance:g} points of {plain.accuracy:.1%}; try other strengths (--alpha0) or keywords"
        )
    return min(good, key=lambda c: (c.mean_length, -c.accuracy, c.alpha0, c.layer))
