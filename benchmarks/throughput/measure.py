"""Runs of all engines, in turns, and their figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load.arms import GROUPED, PRODUCTION, SAME, Arm, engine_arguments
from benchmarks.load.engine import Order, Remote, Run
from benchmarks.load.lengths import Offered, offered_load, pages_needed
from benchmarks.load.padding import effects

Row = dict[str, Any]
WARM_UP = 400
"""Output tokens of a request of the warm-up, at most; enough for a compaction."""


def measure_pools(args: argparse.Namespace, load: Sequence[Offered], logs: Path) -> tuple[list[Row], dict[Arm, Run]]:
    """Measure all engines over all pools: a row for each, and the last run of each."""
    needed = pages_needed(load, args.block_size)
    arms = [Arm(name, pool) for pool in args.pools for name in (PRODUCTION, SAME, args.policy)]
    runs = in_turns(
        {arm: engine_arguments(args, arm, load, int(arm.pool * needed)) for arm in arms},
        [Order(load, not args.natural_stop)],
        args.rounds,
        logs,
        one_by_one=args.one_by_one,
    )
    rows = [row_of(arm, [round_[0] for round_ in rounds]) for arm, rounds in runs.items()]
    by_arm = {(row["arm"], row["pool"]): row for row in rows}
    for row in rows:
        for name, base in (("of_same", SAME), ("of_production", PRODUCTION)):
            row[name] = ratio(row, by_arm[base, row["pool"]])
        row["of_full_at_largest"] = ratio(row, by_arm[SAME, max(args.pools)])
    return rows, {arm: rounds[-1][0] for arm, rounds in runs.items()}


def measure_grouping(args: argparse.Namespace, logs: Path) -> list[Row]:
    """Measure the policy with and without grouping, on prompts of mixed lengths and few requests at once."""
    mixed = argparse.Namespace(
        **vars(args) | {"lengths": "sharegpt", "requests": args.grouping_requests, "output_min": 16, "output_max": 384}
        | {"output_median": None, "prompt_median": None, "max_num_seqs": args.grouping_batch}
    )  # fmt: skip
    load = offered_load(mixed)
    parts = [load[rank :: args.grouping_ranks] for rank in range(args.grouping_ranks)]
    arms = [Arm(name, 1.0) for name in (args.policy, args.policy + GROUPED)]
    pages = pages_needed(load, args.block_size)
    arguments = {arm: engine_arguments(mixed, arm, load, pages) for arm in arms}
    # A rank of data parallelism runs its own part; the whole is what one engine does.
    orders = [Order(part, True) for part in (load, *parts)]
    runs = in_turns(arguments, orders, args.grouping_rounds, logs, one_by_one=args.one_by_one)
    rows = []
    for arm, rounds in runs.items():
        row = row_of(arm, [round_[0] for round_ in rounds])
        found = [effects(round_[0], round_[1:], load, args.grouping_batch) for round_ in rounds]
        row |= {key: median(each[key] for each in found) for key in found[0]}
        row["longest_overtaken"] = max(each["longest_overtaken"] for each in found)
        row["bound"] = args.grouping_max_wait if arm.name.endswith(GROUPED) else None
        rows.append(row)
    for row in rows:
        row["of_ungrouped"] = ratio(row, rows[0])
    return rows


def in_turns(
    arguments: Mapping[Arm, Mapping[str, Any]],
    orders: Sequence[Order],
    rounds: int,
    logs: Path,
    *,
    one_by_one: bool = False,
) -> dict[Arm, list[list[Run]]]:
    """Runs by arm, round and order. The engines take turns, and the first to run changes from round to round.

    With `one_by_one` an engine has all its rounds before the next one starts.
    """
    if one_by_one and len(arguments) > 1:
        alone = [in_turns({arm: each}, orders, rounds, logs) for arm, each in arguments.items()]
        return {arm: each for runs in alone for arm, each in runs.items()}
    engines: dict[Arm, Remote] = {}
    runs: dict[Arm, list[list[Run]]] = {arm: [] for arm in arguments}
    try:
        for arm, each in arguments.items():
            print(f"starting {arm.name} with a pool of {arm.pool:g}", file=sys.stderr)
            engines[arm] = Remote(each, logs / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{arm.pool:g}.log")
            # Shapes that were never seen cost their first run a compilation; the load's beginning has them.
            engines[arm].answer(Order([Offered(p, min(o, WARM_UP)) for p, o in orders[0].load], True))
        for number in range(rounds):
            for arm in list(arguments) if number % 2 == 0 else reversed(list(arguments)):
                runs[arm].append([engines[arm].answer(order) for order in orders])
                run = runs[arm][-1][0]
                print(
                    f"{arm.name}, pool {arm.pool:g}: {run.output_tokens / run.seconds:,.0f} tokens/s, "
                    f"{run.peak_running} at once, {run.preemptions} preemptions, {run.compactions} compactions",
                    file=sys.stderr,
                )
    finally:
        for engine in engines.values():
            engine.stop()
    return runs


def row_of(arm: Arm, runs: Sequence[Run]) -> Row:
    """Figures of an engine: medians over its runs; counts are the same in each."""
    last = runs[-1]
    with_compaction = last.steps[:, 5] > 0
    seconds = last.steps[:, 0]
    ms = {
        "ttft_p50_ms": _percentile([run.ttft for run in runs], 50),
        "ttft_p99_ms": _percentile([run.ttft for run in runs], 99),
        "itl_p50_ms": _percentile([run.itl for run in runs], 50),
        "itl_p99_ms": _percentile([run.itl for run in runs], 99),
        "step_ms": np.median(seconds[~with_compaction]) if not with_compaction.all() else None,
        "compaction_step_ms": np.median(seconds[with_compaction]) if with_compaction.any() else None,
    }
    return {
        "arm": arm.name,
        "pool": arm.pool,
        "pages": last.num_pages,
        "tokens_per_second": median(run.output_tokens / run.seconds for run in runs),
        "rates": [run.output_tokens / run.seconds for run in runs],
        "requests_per_second": median(run.finished / run.seconds for run in runs),
        **{name: None if value is None else 1000 * float(value) for name, value in ms.items()},
        "peak_running": max(run.peak_running for run in runs),
        "preemptions": max(run.preemptions for run in runs),
        "compactions": last.compactions,
        "steps": len(last.steps),
    }


def _percentile(times: Sequence[Any], share: float) -> float:
    """Median over the runs of a percentile of their times."""
    return median(float(np.percentile(each, share)) for each in times)


def ratio(row: Row, base: Row) -> float:
    """Median over the rounds of the ratio of two engines' rates."""
    return median(a / b for a, b in zip(row["rates"], base["rates"], strict=True))
