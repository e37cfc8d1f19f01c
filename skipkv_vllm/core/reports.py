"""What workers report to the scheduler."""

from __future__ import annotations

from typing import NamedTuple


class RecalledTokens(NamedTuple):
    """How many evicted tokens came back since a worker started, each number a mean of its layers and heads.

    Attributes:
        recalled: all of them.
        checked: those that were still in place at the next exchange; a compaction between the two rules some out.
        used: those of the checked ones that a query asked for there again.
    """

    recalled: float = 0.0
    checked: float = 0.0
    used: float = 0.0
