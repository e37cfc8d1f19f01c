"""Time our operators, PyTorch's and R-KV-style code side by side; write `docs/results/kernels.json`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from benchmarks.results.sections.operators import compaction_table, measuring_table, scoring_table
from benchmarks.results.store import DOCS, OPERATORS
from skipkv_vllm.ops import native

from .bench import KEYS, Settings, bench_compaction, bench_measuring, bench_scoring

Row = dict[str, Any]
LENGTHS = (640, 1152, 2176, 4224)
BARS = {
    "scoring at L = 2176 is at least 8 times as fast as R-KV style": 8.0,
    "scoring of distinct keys does at least half of a matmul's GFLOP/s": 0.5,
    "no head moves more tokens than the buffer has": 1.0,
    "compaction at B = 1024 is at least 5 times as fast as a rewrite": 5.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if a bar was missed."""
    args = _parser().parse_args(arguments)
    if why := native.unavailable("cpu"):
        print(f"error: {why}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    lengths = (640, 1152) if args.quick and args.lengths == list(LENGTHS) else tuple(args.lengths)
    settings = Settings(
        lengths=lengths,
        repeats=3 if args.quick else args.repeats,
        seconds=0.5 if args.quick else args.seconds,
        **{key: getattr(args, key) for key in ("buffer", "layers", "heads", "query_heads", "dim", "window")},
        **{key: getattr(args, key) for key in ("page_size", "layout", "dtype")},
    )
    scoring = []
    for length in lengths:
        for keys in KEYS:
            scoring.append(bench_scoring(settings, length, keys))
            print(f"scored {length} {keys} keys: {scoring[-1]['ours_ms']:.3g} ms", file=sys.stderr)
    measuring = [bench_measuring(settings, length) for length in lengths]
    compaction = [bench_compaction(settings, length) for length in lengths]
    print(f"\n{scoring_table(scoring)}\n\n{measuring_table(measuring)}\n\n{compaction_table(compaction)}\n")
    bars = check_bars(scoring, compaction)
    for text, (value, reached) in bars.items():
        print(f"{'reached' if reached else 'MISSED '} {text}: {value:.2f}")
    run = record("benchmarks.kernels", dataclasses.asdict(settings), arguments, threads=args.threads, note=args.note)
    figures = {
        "run": run,
        "bars": {text: value for text, (value, _) in bars.items()},
        "scoring": scoring,
        "measuring": measuring,
        "compaction": compaction,
    }
    publish(figures, args.out)
    return 0 if all(reached for _, reached in bars.values()) else 1


def check_bars(
    scoring: Sequence[dict[str, Any]], compaction: Sequence[dict[str, Any]]
) -> dict[str, tuple[float, bool]]:
    """Check the bars that apply to these lengths: each with its figure, and whether the figure reaches it."""
    fast, machine_share, buffer, cheap = BARS
    found: dict[str, tuple[float, bool]] = {}
    at_2176 = [row["speedup_over_rkv"] for row in scoring if row["length"] == 2176]
    if at_2176:
        found[fast] = (min(at_2176), min(at_2176) >= BARS[fast])
    shares = [row["of_matmul"] for row in scoring if "of_matmul" in row]
    found[machine_share] = (min(shares), min(shares) >= BARS[machine_share])
    moved = max(row["most_moved_per_head"] / row["buffer"] for row in compaction)
    found[buffer] = (moved, moved <= BARS[buffer])
    at_1024 = [row["speedup_over_rewrite"] for row in compaction if row["budget"] == 1024]
    if at_1024:
        found[cheap] = (min(at_1024), min(at_1024) >= BARS[cheap])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="L", help="tokens held")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--buffer", type=int, default=128, help="tokens that a compaction frees")
    parser.add_argument("--heads", type=int, default=8, help="kv heads")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128, help="head size")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--layout", default="vec", choices=["rows", "vec", "amx"], help="how pages are packed")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds at least")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for each row")
    parser.add_argument("--note", default="", help="something that readers of the results should know")
    parser.add_argument("--quick", action="store_true", help="short lengths, few rounds")
    parser.add_argument("--out", type=Path, default=DOCS / OPERATORS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
