"""Throughput of full KV and of a policy at equal memory, over pool sizes; and what batch grouping does.

    python -m benchmarks.throughput --pools 0.1 0.3 1 --lengths reasoning --output-median 1600

All requests are there at the start. A pool of 1 holds all of them at their full length; smaller ones have that share
of its memory, and a policy pays for its positions out of it. Engines have a process each and take turns, one load at
a time, so that a disturbance meets all alike: ratios mean more than rates. Where the memory holds one engine only, as
on a GPU, `--one-by-one` ends each before the next starts. The steps of the two engines with the largest pool calibrate
the simulator, which then predicts all engines; its error is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from skipkv_vllm import KVPolicyError, bundled_model
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.evaluation.machine import commit, machine, relative, versions

from .accuracy.docs import DOCS, TINY, write_docs, write_summary
from .load.arms import (
    GROUPED,
    PRODUCTION,
    SAME,
    Arm,
    add_engine_arguments,
    check_engine_arguments,
    engine_arguments,
    model_shape,
    policy_config,
    pool_pages,
)
from .load.engine import EngineError, Order, Remote, Run
from .load.lengths import Offered, add_length_arguments, check_length_arguments, offered_load, pages_needed
from .load.padding import effects
from .load.section import THROUGHPUT, grouping_table, pools_table, prediction_table
from .simulate.events import Engine, Setup
from .simulate.steptime import StepTime, fit

Row = dict[str, Any]
WARM_UP = 400
"""Output tokens of a request of the warm-up, at most; enough for a compaction."""
BARS = {
    "same pool of at most 10 %: the policy over the faster full KV": ("same_pool", 2.5),
    "pool of at most 10 %: the policy over full KV with the largest pool": ("small_over_full", 0.85),
    "largest pool: the policy over full KV": ("ample", 0.98),
    "grouping over no grouping": ("grouping", 0.99),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 where a bar was missed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    load = offered_load(args)
    try:
        with tempfile.TemporaryDirectory(prefix="skipkv-throughput-") as folder:
            logs = args.logs or Path(folder)
            logs.mkdir(parents=True, exist_ok=True)
            pools, runs = measure_pools(args, load, logs)
            grouping = measure_grouping(args, logs) if args.grouping_rounds else []
    except (EngineError, KVPolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calibration, predictions = predict(args, load, runs)
    print(f"\n{pools_table(pools)}\n\n{grouping_table(grouping)}\n\n{prediction_table(predictions)}\n")
    bars = check_bars(pools, grouping)
    for text, (value, reached) in bars.items():
        print(f"{'reached' if reached else 'MISSED '} {text}: {value:.3g}")
    settings = vars(args) | {"model": relative(args.model), "out": str(args.out), "logs": str(args.logs)}
    figures = {
        "run": {
            "command": ["python", "-m", "benchmarks.throughput", *(sys.argv[1:] if arguments is None else arguments)],
            "commit": commit(),
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "note": args.note,
            "settings": settings,
        },
        "load": {
            "requests": len(load),
            "prompt_tokens": sum(each.num_prompt for each in load),
            "output_tokens": sum(each.num_output for each in load),
            "shortest_output": min(each.num_output for each in load),
            "longest": max(each.length for each in load),
            "pages": pages_needed(load, args.block_size),
        },
        "bars": {text: value for text, (value, _) in bars.items()},
        "calibration": calibration,
        "pools": pools,
        "grouping": grouping,
        "predictions": predictions,
    }
    write_summary(figures, args.out)
    print(f"wrote {args.out}")
    if args.out == DOCS / THROUGHPUT:
        from .load.plot import crossover

        print(f"wrote {crossover(pools, DOCS / 'results')}")
        if (DOCS / TINY).exists():
            print(f"wrote {write_docs(DOCS)}")
    return 0 if all(reached for _, reached in bars.values()) else 1


def measure_pools(args: argparse.Namespace, load: Sequence[Offered], logs: Path) -> tuple[list[Row], dict[Arm, Run]]:
    """All engines over all pools: a row for each, and the last run of each."""
    needed = pages_needed(load, args.block_size)
    arms = [Arm(name, pool) for pool in args.pools for name in (PRODUCTION, SAME, args.policy)]
    runs = in_turns(
        {arm: engine_arguments(args, arm, load, int(arm.pool * needed)) for arm in arms},
        [Order(load, not args.natural_stop)],
        args.rounds,
        logs,
        one_by_one=args.one_by_one,
    )
    rows = [_row(arm, [round_[0] for round_ in rounds]) for arm, rounds in runs.items()]
    by_arm = {(row["arm"], row["pool"]): row for row in rows}
    for row in rows:
        for name, base in (("of_same", SAME), ("of_production", PRODUCTION)):
            row[name] = _ratio(row, by_arm[base, row["pool"]])
        row["of_full_at_largest"] = _ratio(row, by_arm[SAME, max(args.pools)])
    return rows, {arm: rounds[-1][0] for arm, rounds in runs.items()}


def measure_grouping(args: argparse.Namespace, logs: Path) -> list[Row]:
    """The policy with and without grouping, on prompts of mixed lengths and few requests at once."""
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
        row = _row(arm, [round_[0] for round_ in rounds])
        found = [effects(round_[0], round_[1:], load, args.grouping_batch) for round_ in rounds]
        row |= {key: median(each[key] for each in found) for key in found[0]}
        row["longest_overtaken"] = max(each["longest_overtaken"] for each in found)
        row["bound"] = args.grouping_max_wait if arm.name.endswith(GROUPED) else None
        rows.append(row)
    for row in rows:
        row["of_ungrouped"] = _ratio(row, rows[0])
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


def _row(arm: Arm, runs: Sequence[Run]) -> Row:
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


def _ratio(row: Row, base: Row) -> float:
    """Median over the rounds of the ratio of two engines' rates."""
    return median(a / b for a, b in zip(row["rates"], base["rates"], strict=True))


def predict(
    args: argparse.Namespace, load: Sequence[Offered], runs: Mapping[Arm, Run]
) -> tuple[dict[str, Any], list[Row]]:
    """Fit the step time of full KV and of the policy with the largest pool; predict every engine and its error."""
    largest = max(args.pools)
    times: dict[bool, StepTime] = {
        arm.evicts: fit(run.steps) for arm, run in runs.items() if arm.pool == largest and arm.name != PRODUCTION
    }
    config, needed, rows = policy_config(args), pages_needed(load, args.block_size), []
    for arm, run in runs.items():
        if arm.name == PRODUCTION or args.natural_stop:
            continue
        limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0) if arm.evicts else None
        pages = pool_pages(args, arm, int(arm.pool * needed))
        setup = Setup(
            pages,
            args.block_size,
            args.max_num_seqs,
            args.max_num_batched_tokens,
            limits,
            protect_prompt=config.kv_protect_prompt,
        )
        outcome = Engine(load, setup).run(times[arm.evicts])
        measured = run.output_tokens / run.seconds
        rows.append(
            {
                "arm": arm.name,
                "pool": arm.pool,
                "fitted": arm.pool == largest,
                "measured": measured,
                "predicted": outcome.tokens_per_second,
                "error": outcome.tokens_per_second / measured - 1,
                "steps": [len(run.steps), outcome.steps],
                "preemptions": [run.preemptions, outcome.preemptions],
                "compactions": [run.compactions, outcome.compactions],
                "peak_running": [run.peak_running, outcome.peak_running],
            }
        )
    shape = model_shape(args)
    calibration = {
        "full": times[False].as_dict(),
        args.policy: times[True].as_dict(),
        "shape": vars(shape),
        "bound": config.kv_budget + config.kv_buffer,
        "buffer": config.kv_buffer,
    }
    return calibration, rows


def check_bars(pools: Iterable[Row], grouping: Sequence[Row]) -> dict[str, tuple[float, bool]]:
    """The bars that these runs say something about: the figure, and whether it reaches the bar."""
    rows = list(pools)
    found: dict[str, float] = {}
    policy = [row for row in rows if row["arm"] not in (PRODUCTION, SAME)]
    small = [row for row in policy if row["pool"] <= 0.1]
    largest = max(row["pool"] for row in rows)
    if small:
        found["same_pool"] = min(min(row["of_same"], row["of_production"]) for row in small)
    if small and largest >= 1:
        found["small_over_full"] = min(row["of_full_at_largest"] for row in small)
    if largest >= 1:
        found["ample"] = min(row["of_same"] for row in policy if row["pool"] == largest)
    if grouping:
        found["grouping"] = min(row["of_ungrouped"] for row in grouping)
    bars = {text: (found[key], found[key] >= bar) for text, (key, bar) in BARS.items() if key in found}
    preemptions = sum(row["preemptions"] for row in [*policy, *grouping])
    bars["preemptions of the policy: none"] = (preemptions, preemptions == 0)
    for row in grouping:
        if row["bound"] is not None:
            late = row["longest_overtaken"]
            bars[f"overtaken at most {row['bound']:g} s past the turn"] = (late, late < row["bound"] or late == 0)
    return bars


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check_length_arguments(args, parser)
    check_engine_arguments(args, parser)
    if args.rounds < 1 or args.grouping_rounds < 0:
        parser.error("--rounds must be 1 or more, --grouping-rounds 0 or more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pools", type=float, nargs="+", default=[0.1, 0.3, 1.0], metavar="SHARE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--grouping-rounds", type=int, default=5, help="0 leaves grouping out")
    parser.add_argument("--grouping-requests", type=int, default=96)
    parser.add_argument("--grouping-batch", type=int, default=8, help="requests at once")
    parser.add_argument("--grouping-ranks", type=int, default=2, help="data-parallel ranks whose padding is counted")
    parser.add_argument(
        "--one-by-one", action="store_true", help="one engine at a time, where the memory does not hold all of them"
    )
    parser.add_argument("--note", default="", help="something that readers of the results should know")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--out", type=Path, default=DOCS / THROUGHPUT)
    add_engine_arguments(parser, bundled_model())
    add_length_arguments(parser)
    parser.set_defaults(output_median=1600)
    return parser


if __name__ == "__main__":
    sys.exit(main())
