"""Markdown tables and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 0) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def milliseconds(value: float | None) -> str:
    """Three digits, or whole milliseconds from 100 on; empty for None."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it takes one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
