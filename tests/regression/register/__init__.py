"""Known bugs and weaknesses of other KV-eviction projects, and the tests that show that this project has none of them.

Tests have pytest's names, without parameters. `pytest $(python -m tests.regression.register W7)` runs those of
a row, `python -m tests.regression.register` lists the rows.
"""

from __future__ import annotations

import sys

from tests.regression.register.bugs import BUGS
from tests.regression.register.demands import DEMANDS
from tests.regression.register.weaknesses import WEAKNESSES

ROWS = BUGS | WEAKNESSES | DEMANDS


def main(names: list[str]) -> int:
    """Print the tests of rows, or all rows."""
    if not names:
        print("\n".join(f"{name}: {row.title} ({row.source}; tests: {len(row.tests)})" for name, row in ROWS.items()))
        return 0
    if unknown := [name for name in names if name not in ROWS]:
        print(f"no such row: {', '.join(unknown)}", file=sys.stderr)
        return 2
    print("\n".join(test for name in names for test in ROWS[name].tests))
    return 0


__all__ = ["BUGS", "DEMANDS", "ROWS", "WEAKNESSES", "main"]
