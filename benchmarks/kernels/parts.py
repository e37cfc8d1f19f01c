"""The parts of a run, in the order of the tables or of their importance, and as many of them as there is time for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bars import MOST_IMPORTANT_LENGTH, MOST_IMPORTANT_TOKENS
from .bench import KEYS, Row, Settings, bench_compaction, bench_measuring, bench_scoring
from .machine import Machine
from .steps import bench_step

Figures = dict[str, list[Any]]
"""Table -> rows; `skipped` has the sizes for which memory did not suffice, `not_reached` the names of parts for which
time did not."""

TABLES = ("scoring", "measuring", "compaction", "steps", "skipped")


class Part(NamedTuple):
    """Compactions of some requests of a length, or steps of some tokens; the other numbers are 0."""

    length: int = 0
    requests: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"steps of {self.tokens}" if self.tokens else f"{self.requests} x {self.length}"

    def importance(self) -> tuple[bool, int, int, int]:
        """Return a key by which the most important parts come first.

        Bars are about one request and about the queries of a step, of one size each. The time of a part grows with its
        requests.
        """
        if self.tokens:
            return self.tokens != MOST_IMPORTANT_TOKENS, 1, 0, self.tokens
        return self.length != MOST_IMPORTANT_LENGTH, 0 if self.requests == 1 else 2, self.requests, self.length


def parts_of(settings: Settings, tokens: Sequence[int]) -> list[Part]:
    """Return all parts, in the order of the tables."""
    found = [Part(length, requests) for length in settings.lengths for requests in settings.requests]
    return found + [Part(tokens=number) for number in tokens]


def measure(
    machine: Machine,
    settings: Settings,
    tokens: Sequence[int],
    partial: Path | None = None,
    within: float | None = None,
) -> Figures:
    """Measure all rows; those for which memory or time does not suffice are named.

    Args:
        machine, settings: where and how.
        tokens: of the steps.
        partial: file for the rows so far, for a run that may be stopped.
        within: seconds after which no part is begun, except the first; the most important ones then come first.
    """
    start, found = time.monotonic(), dict[Part, Figures]()
    parts = parts_of(settings, tokens)
    for part in parts if within is None else sorted(parts, key=Part.importance):
        if within is not None and found and time.monotonic() - start > within:
            break
        found[part] = _measure(machine, settings, part)
        if partial is not None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(_in_order(parts, found)))
    return _in_order(parts, found)


def _in_order(parts: Sequence[Part], found: Mapping[Part, Figures]) -> Figures:
    """Return the rows of all parts in the order of the tables, and what is missing."""
    figures: Figures = {
        table: [row for part in parts if part in found for row in found[part].get(table, ())] for table in TABLES
    }
    missing = [str(part) for part in parts if part not in found]
    return figures | ({"not_reached": missing} if missing else {})


def _measure(machine: Machine, settings: Settings, part: Part) -> Figures:
    """Return the rows of a part."""
    length, requests, tokens = part
    if tokens:
        return {"steps": bench_step(machine, settings, tokens)}
    needed, free = settings.needed_memory(length, requests), machine.clock.free_memory()
    if needed > free and machine.clock.kind != "cpu":
        print(f"skipped {part}: {needed >> 30} GiB needed, {free >> 30} free", file=sys.stderr)
        return {"skipped": [{"length": length, "requests": requests, "needed": needed, "free": free}]}
    scoring: list[Row] = []
    for keys in KEYS:
        scoring.append(bench_scoring(machine, settings, length, keys, requests))
        print(f"scored {part} {keys} keys: {scoring[-1]['ours_ms']:.3g} ms", file=sys.stderr)
    measuring = bench_measuring(machine, settings, length, requests)
    compaction = bench_compaction(machine, settings, length, requests)
    return {"scoring": scoring, "measuring": [measuring], "compaction": [compaction]}
