"""Markdown of the results page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 0) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
