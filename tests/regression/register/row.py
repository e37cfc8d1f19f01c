"""A row of the register."""

from __future__ import annotations

from typing import NamedTuple

U, E, R, G = "tests/unit/", "tests/engine/test_", "tests/regression/test_", "tests/gpu/test_"


class Row(NamedTuple):
    """One bug or weakness.

    Attributes:
        source: whose it is, with the number of the issue where there is one.
        title: what goes wrong.
        tests: where it is tested; those of `tests/gpu` need a GPU.
    """

    source: str
    title: str
    tests: tuple[str, ...]
