"""Throughput of full KV and of a policy at equal memory, over pool sizes; and the effect of batch grouping.

    python -m benchmarks.throughput --pools 0.1 0.3 1 --lengths reasoning --output-median 1600

All requests are there at the start. A pool of 1 holds all of them at their full length; smaller ones have that share
of its memory, and a policy pays for its positions out of it. Engines have a process each and take turns, one load at
a time, so that a disturbance meets all alike: ratios mean more than rates. Where the memory holds one engine only, as
on a GPU, `--one-by-one` ends each before the next starts. The steps of the two engines with the largest pool calibrate
the simulator, which then predicts all engines; its error is printed.

With `--speculation` full KV and the policy run with n-gram drafts and without, and nothing else is measured. All four
engines schedule synchronously, as vLLM's search for n-grams on the host cannot do otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load.arms import add_engine_arguments, check_engine_arguments
from benchmarks.load.lengths import Offered, add_length_arguments, check_length_arguments, offered_load, pages_needed
from benchmarks.results.pages import publish
from benchmarks.results.plots.throughput import draw_throughput
from benchmarks.results.provenance import record
from benchmarks.results.sections.speculation import speculation_table
from benchmarks.results.sections.throughput import grouping_table, pools_table, prediction_table
from benchmarks.results.store import DOCS, RESULTS, SPECULATION, THROUGHPUT
from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.command import guarded
from skipkv_vllm.evaluation.machine import relative

from .bars import check_bars
from .measure import measure_grouping, measure_pools
from .predict import predict
from .speculation import measure_speculation


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if an engine failed or a bar was missed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    args.out = args.out or DOCS / (SPECULATION if args.speculation else THROUGHPUT)
    return guarded(parser.prog, lambda: run(args, arguments), stopped="nothing was written")


def run(args: argparse.Namespace, arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the figures.

    Raises:
        RunError: an engine failed, or a bar was missed.
    """
    load = offered_load(args)
    if args.speculation:
        run_speculation(args, arguments, load)
        return
    with _logs(args) as logs:
        pools, runs = measure_pools(args, load, logs)
        grouping = measure_grouping(args, logs) if args.grouping_rounds else []
    calibration, predictions = predict(args, load, runs)
    print(f"\n{pools_table(pools)}\n\n{grouping_table(grouping)}\n\n{prediction_table(predictions)}\n")
    bars = check_bars(pools, grouping)
    for text, (value, reached) in bars.items():
        print(f"{'reached' if reached else 'MISSED '} {text}: {value:.3g}")
    figures = _provenance(args, arguments, load) | {
        "bars": {text: value for text, (value, _) in bars.items()},
        "calibration": calibration,
        "pools": pools,
        "grouping": grouping,
        "predictions": predictions,
    }
    if args.out == DOCS / THROUGHPUT:
        print(f"wrote {draw_throughput(pools, DOCS / RESULTS)}")
    publish(figures, args.out)
    if missed := [text for text, (_, reached) in bars.items() if not reached]:
        raise RunError(f"missed: {'; '.join(missed)}")


def run_speculation(args: argparse.Namespace, arguments: Sequence[str] | None, load: Sequence[Offered]) -> None:
    """Measure full KV and the policy with and without drafts, print the table and write the figures.

    Raises:
        RunError: an engine failed.
    """
    with _logs(args) as logs:
        rows = measure_speculation(args, load, logs)
    print(f"\n{speculation_table(rows)}\n")
    publish(_provenance(args, arguments, load) | {"speculation": rows}, args.out)


@contextmanager
def _logs(args: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="skipkv-throughput-") as folder:
        logs = args.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        yield logs


def _provenance(
    args: argparse.Namespace, arguments: Sequence[str] | None, load: Sequence[Offered]
) -> dict[str, dict[str, Any]]:
    settings = vars(args) | {"model": relative(args.model)}
    return {
        "run": record("benchmarks.throughput", settings, arguments, note=args.note),
        "load": {
            "requests": len(load),
            "prompt_tokens": sum(each.num_prompt for each in load),
            "output_tokens": sum(each.num_output for each in load),
            "shortest_output": min(each.num_output for each in load),
            "longest": max(each.length for each in load),
            "pages": pages_needed(load, args.block_size),
        },
    }


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
    parser.add_argument(
        "--speculation", action="store_true", help="with and without n-gram drafts, instead of all else"
    )
    parser.add_argument("--grouping-rounds", type=int, default=5, help="0 leaves grouping out")
    parser.add_argument("--grouping-requests", type=int, default=96)
    parser.add_argument("--grouping-batch", type=int, default=8, help="requests at once")
    parser.add_argument("--grouping-ranks", type=int, default=2, help="data-parallel ranks whose padding is counted")
    parser.add_argument(
        "--one-by-one", action="store_true", help="one engine at a time, where the memory does not hold all of them"
    )
    parser.add_argument("--note", default="", help="something that readers of the results should know")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--out", type=Path, help=f"default: {DOCS / THROUGHPUT}, or {DOCS / SPECULATION}")
    add_engine_arguments(parser, bundled_model())
    add_length_arguments(parser)
    parser.set_defaults(output_median=1600)
    return parser


if __name__ == "__main__":
    sys.exit(main())
