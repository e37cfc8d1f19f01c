"""What eviction costs a decode step: stock vLLM and an evicting engine at equal resident lengths, in turns.

    python -m benchmarks.overhead --budgets 256 1024 --batch-sizes 1 16

Each engine has a process of its own and all cores while it works; the other one waits. The stock engine starts fresh
requests of `budget` tokens and decodes `buffer` steps, so it holds budget to budget + buffer tokens a request. The
evicting one goes on decoding long requests, which hold the same after their first compaction, and every stretch of
`buffer` steps has one compaction of each request in it. Prefills are not timed.

    python -m benchmarks.overhead --steering

measures steering in the same way, without eviction: a server with a vector that steers every request, and one whose
requests are not steered. The vector is so short that all engines write the same text.

    python -m benchmarks.overhead --recall 1

compares two evicting engines, the second of which has 1 GiB of host memory for tokens that come back.

    python -m benchmarks.overhead --layers 8 --hidden-size 768 --budgets 256

measures a model of that size with random weights: what it writes means nothing, but a step takes what it would take. A
step grows with the number of weights, a compaction with the size of the KV cache only, so the bundled model, which has
hardly any weights, is the worst case.

    python -m benchmarks.overhead --shape qwen3-8b --one-by-one --compiled --strict --dtype bfloat16 --budgets 1024 \\
        --batch-sizes 1 128 --engine '{"attention_backend": "FLASH_ATTN"}'

measures a published shape, whose weights vLLM draws itself, on a GPU, whose memory holds one engine at a time. --strict
fails if the evicting engine makes the host wait for the device or compiles a kernel while requests run (where this vLLM
can tell), or if an engine has another attention backend, graph mode or scheduler than --engine asks for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.command import guarded
from skipkv_vllm.evaluation.machine import relative

from .engine import LONGEST, Shape
from .measure import STEERING_ARMS, TURN, measure, measure_one_by_one, measure_steering
from .models import SHAPES, random_model, shaped_model, short_vector

Row = dict[str, Any]


class Kind(NamedTuple):
    """A kind of measurement: how it is made and printed, and the count without which it means nothing."""

    measure: Callable[[Shape, argparse.Namespace, Path], Row]
    head: str
    line: Callable[[Row], str]
    is_enough: Callable[[Row], bool]
    missing: str


def _eviction_line(row: Row) -> str:
    return (
        f"{row['budget']:6}{row['batch_size']:7}{row['stock_ms']:10.2f}{row['evicting_ms']:13.2f}{row['ratio']:8.3f}"
        f"{_spread(row, 'ratio')}{row['compactions']:13}"
    )


def _recall_line(row: Row) -> str:
    return (
        f"{row['budget']:6}{row['batch_size']:7}{row['evicting_ms']:13.2f}{row['recalling_ms']:14.2f}{row['ratio']:8.3f}"
        f"{_spread(row, 'ratio')}{row['compactions']:13}{row['recalled']:11.1f}"
    )


def _steering_line(row: Row) -> str:
    ratios = "".join(f"{row[f'{arm}_ratio']:9.3f}{_spread(row, arm)}" for arm in STEERING_ARMS[1:])
    return f"{row['length']:6}{row['batch_size']:7}{row['stock_ms']:10.2f}{ratios}{row['steered_tokens']:8}"


def _spread(row: Row, name: str) -> str:
    return f"{row[f'{name}_low']:.3f} - {row[f'{name}_high']:.3f}".rjust(16)


EVICTION = Kind(
    measure,
    f"{'budget':>6}{'batch':>7}{'stock ms':>10}{'evicting ms':>13}{'ratio':>8}{'from - to':>16}{'compactions':>13}",
    _eviction_line,
    lambda row: row["compactions"] >= row["batch_size"] * row["rounds"] // 2,
    "hardly any compaction took place; these are not figures of eviction",
)
RECALL = Kind(
    measure,
    f"{'budget':>6}{'batch':>7}{'evicting ms':>13}{'recalling ms':>14}{'ratio':>8}{'from - to':>16}{'compactions':>13}"
    f"{'came back':>11}",
    _recall_line,
    EVICTION.is_enough,  # asking costs the same whether anything comes back or not
    "hardly any compaction took place; these are not figures of recall",
)
STEERING = Kind(
    measure_steering,
    f"{'length':>6}{'batch':>7}{'stock ms':>10}{'steered':>9}{'from - to':>16}{'idle':>9}{'from - to':>16}"
    f"{'tokens':>8}",
    _steering_line,
    lambda row: row["steered_tokens"] >= row["batch_size"] * row["rounds"],
    "hardly any token was steered; these are not figures of steering",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    return guarded(parser.prog, lambda: run(args, arguments), stopped="nothing was written")


def run(args: argparse.Namespace, arguments: Sequence[str] | None = None) -> None:
    """Measure and print every shape, and write the figures if asked to.

    Raises:
        RunError: an engine failed, or hardly anything was evicted or steered.
    """
    kind, rows = STEERING if args.steering else RECALL if args.recall else EVICTION, []
    settings = vars(args) | {"model": relative(args.model), "out": str(args.out)}
    with tempfile.TemporaryDirectory(prefix="skipkv-overhead-") as name:
        folder = Path(name)
        if args.steering:
            args.vector = short_vector(args.model, folder)
        if args.layers is not None:
            args.model = random_model(args.model, args.layers, args.hidden_size, folder)
        if args.shape is not None:
            args.model = shaped_model(args.shape, args.model, folder)
        print(kind.head)
        for row in _measured(kind, args, folder):
            rows.append(row)
            print(kind.line(row), flush=True)
            if not kind.is_enough(row):
                raise RunError(kind.missing)
    if args.out:
        publish({"run": record("benchmarks.overhead", settings, arguments), "shapes": rows}, args.out)


def _measured(kind: Kind, args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure every shape."""
    for budget in args.budgets:
        if args.one_by_one:
            yield from measure_one_by_one(Shape(budget, max(args.batch_sizes)), args, folder)
        else:
            for batch_size in args.batch_sizes:
                yield kind.measure(Shape(budget, batch_size), args, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--policy", default="skipkv")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default graphs instead of eager mode")
    parser.add_argument("--steering", action="store_true", help="measure steering instead of eviction")
    parser.add_argument("--recall", type=float, metavar="GIB", help="measure recall with so much host memory instead")
    parser.add_argument("--layers", type=int, help="with --hidden-size: of a model with random weights")
    parser.add_argument("--hidden-size", type=int, help="a multiple of 256; see --layers")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of a published model, with random weights")
    parser.add_argument(
        "--one-by-one", action="store_true", help="one engine at a time, where the memory does not hold both"
    )
    parser.add_argument("--strict", action="store_true", help="see above")
    parser.add_argument("--memory", type=float, metavar="SHARE", help="of a GPU for each engine; vLLM's own default")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further arguments of vllm.LLM")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, e.g. docs/results/overhead.json")
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.policy == "full":
        parser.error("--policy full evicts nothing; its cost is not measured here")
    if args.buffer < TURN or args.buffer % TURN:
        parser.error(f"--buffer {args.buffer} must be a multiple of {TURN}")
    if max(args.budgets) + 3 * args.buffer > LONGEST:
        parser.error(f"--budgets {max(args.budgets)} is out of range; allowed: up to {LONGEST - 3 * args.buffer}")
    if (args.layers is None) != (args.hidden_size is None):
        parser.error("--layers and --hidden-size only go together")
    if args.layers is not None and (args.layers < 1 or args.hidden_size < 256 or args.hidden_size % 256):
        parser.error(
            f"--layers {args.layers} --hidden-size {args.hidden_size} is out of range; allowed: layers from 1, "
            "multiples of 256"
        )
    if args.recall is not None and not args.recall > 0:
        parser.error(f"--recall {args.recall:g} is out of range; allowed: above 0")
    if args.recall and args.steering:
        parser.error("--recall and --steering are different measurements; give one of them")
    if args.steering and (args.layers is not None or args.shape is not None or args.one_by_one):
        parser.error(
            "--steering is measured on --model, in turns; leave --layers and --hidden-size, --shape, --one-by-one out"
        )
    if torch.cuda.is_available() and not args.one_by_one and args.memory is None:
        parser.error("a GPU's memory holds one engine by default; use --one-by-one, or --memory 0.45 for two at a time")
    if args.layers is not None and args.shape is not None:
        parser.error("--shape has its own --layers and --hidden-size; leave them out")


if __name__ == "__main__":
    sys.exit(main())
