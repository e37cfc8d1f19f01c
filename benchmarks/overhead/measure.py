"""Step times of engines that take turns, as ratios of each round."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from .engine import Remote, Shape

ARMS = ("stock", "evicting")
RECALL_ARMS = ("evicting", "recalling")
STEERING_ARMS = ("stock", "steered", "idle")
TURN = 16  # steps of one engine before the other has its turn


def arms_of(args: argparse.Namespace) -> tuple[str, str]:
    """Return the two engines that are compared."""
    return RECALL_ARMS if args.recall else ARMS


@contextmanager
def _engines(arms: Sequence[str], shape: Shape, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Remote]]:
    """Start the engines of all arms; they end with the block."""
    engines: dict[str, Remote] = {}
    try:
        for arm in arms:
            engines[arm] = Remote(arm, shape, args, folder)
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


def measure_one_by_one(shape: Shape, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time the engines one after the other, each at all batch sizes, where the memory holds one of them only.

    Args:
        shape: its batch size is the largest.
        args: the command line.
        folder: for logs.

    Returns:
        A row for each batch size; a ratio is that of two engines' rounds with the same number.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    arms, engines = arms_of(args), {}
    compactions, recalled = dict.fromkeys(args.batch_sizes, 0), dict.fromkeys(args.batch_sizes, 0.0)
    for arm in arms:
        with _engines((arm,), shape, args, folder) as started:
            engine = started[arm]
            engines[arm] = engine.call("describe")
            for batch_size in args.batch_sizes:
                engine.call("take", batch_size)
                times = seconds[arm, batch_size] = []
                recalled[batch_size] = -engine.call("recalled")
                for number in range(args.rounds + 1):
                    before = engine.call("start")
                    total = sum(engine.call("steps", TURN) for _ in range(args.buffer // TURN))
                    if number:  # the first round warms up
                        times.append(total)
                        made = engine.call("start") - before
                        compactions[batch_size] += made if arm == arms[1] else 0
                recalled[batch_size] += engine.call("recalled")
    return [
        _row(shape._replace(batch_size=n), args, {arm: seconds[arm, n] for arm in arms}, compactions[n], recalled[n])
        | {"engines": engines}
        for n in args.batch_sizes
    ]


def measure(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time both engines; the ratio is that of each round of `buffer` steps."""
    arms = arms_of(args)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    compactions = 0
    with _engines(arms, shape, args, folder) as engines:
        for number in range(args.rounds + 1):
            before = {arm: engine.call("start") for arm, engine in engines.items()}[arms[1]]
            total = dict.fromkeys(arms, 0.0)
            for _ in range(args.buffer // TURN):
                for arm in arms if number % 2 else reversed(arms):
                    total[arm] += engines[arm].call("steps", TURN)
            if number:  # the first round warms up
                for arm in arms:
                    seconds[arm].append(total[arm])
                compactions += engines[arms[1]].call("start") - before
        recalled = engines[arms[1]].call("recalled")
    return _row(shape, args, seconds, compactions, recalled)


def _row(
    shape: Shape, args: argparse.Namespace, seconds: dict[str, list[float]], compactions: int, recalled: float
) -> dict[str, Any]:
    """Make a row of the rounds of both engines."""
    first, second = arms_of(args)
    ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second], strict=True))
    return ({"recalled": recalled} if args.recall else {}) | {
        "budget": shape.budget,
        "batch_size": shape.batch_size,
        "rounds": args.rounds,
        "compactions": compactions,
        f"{first}_ms": 1000 * median(seconds[first]) / args.buffer,
        f"{second}_ms": 1000 * median(seconds[second]) / args.buffer,
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def measure_steering(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time steered and unsteered requests; the ratios are those of each round of `buffer` steps."""
    seconds: dict[str, list[float]] = {arm: [] for arm in STEERING_ARMS}
    steered = 0
    with _engines(STEERING_ARMS, shape, args, folder) as engines:
        for number in range(args.rounds + 1):
            for engine in engines.values():
                engine.call("start")
            total = dict.fromkeys(STEERING_ARMS, 0.0)
            for turn in range(args.buffer // TURN):
                first = (number + turn) % len(STEERING_ARMS)
                for arm in STEERING_ARMS[first:] + STEERING_ARMS[:first]:
                    total[arm] += engines[arm].call("steps", TURN)
            if number:  # the first round warms up
                for arm in STEERING_ARMS:
                    seconds[arm].append(total[arm])
                steered += engines["steered"].call("steered")
    row: dict[str, Any] = {
        "length": shape.budget,
        "batch_size": shape.batch_size,
        "rounds": args.rounds,
        "steered_tokens": steered,
    }
    for arm in STEERING_ARMS:
        row[f"{arm}_ms"] = 1000 * median(seconds[arm]) / args.buffer
        ratios = sorted(b / a for a, b in zip(seconds["stock"], seconds[arm], strict=True))
        row |= {f"{arm}_ratio": median(ratios), f"{arm}_low": ratios[0], f"{arm}_high": ratios[-1]}
    return row
