"""Time our operators, PyTorch's and R-KV-style code side by side, on a CPU or a GPU; write `docs/results/kernels.json`.

    python -m benchmarks.kernels --device cuda --quick --out build/kernels.json

On a GPU, figures go to `docs/results/kernels-gpu.json`, and `python -m benchmarks.simulate --calibration` reads them.
Only PyTorch is needed beside the operators; vLLM is not.
"""

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
from benchmarks.results.sections.operators import (
    compaction_table,
    measuring_table,
    scoring_table,
    steps_table,
)
from benchmarks.results.store import DOCS, OPERATORS, OPERATORS_ON_GPU
from skipkv_vllm import KVPolicyError

from .bars import check_bars
from .bench import Settings
from .machine import Machine
from .parts import Figures, measure

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": [640, 1152, 2176, 4224],
        "requests": [1],
        "tokens": [1, 16],
        "layers": 4,
        "page_size": 32,
        "layout": "vec",
        "dtype": "float32",
        "seconds": 4.0,
        "out": DOCS / OPERATORS,
    },
    # The layers and the block size of a model that is served.
    "cuda": {
        "lengths": [1152, 2176, 4224],
        "requests": [1, 16, 64],
        "tokens": [1, 128, 512],
        "layers": 36,
        "page_size": 16,
        "layout": "rows",
        "dtype": "bfloat16",
        "seconds": 1.0,
        "out": DOCS / OPERATORS_ON_GPU,
    },
}
"""Device -> defaults that differ between devices."""


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words; None for those of this process.
        machine: to time on instead of this one's device.

    Returns:
        The exit status: 1 if a bar was missed, 2 if there is no such device.
    """
    args = _parser().parse_args(arguments)
    _complete(args, machine.clock.kind if machine else None)
    torch.set_num_threads(args.threads)
    try:
        machine = machine or Machine.of(args.device, getattr(torch, args.dtype))
    except KVPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = _settings(args)
    figures = measure(machine, settings, args.tokens, args.out if args.quick else None, args.within)
    print("\n" + "\n\n".join(_tables(figures)) + "\n")
    bars = check_bars(machine.clock.kind, settings, figures)
    for text, (value, reached) in bars.items():
        print(f"{'reached' if reached else 'MISSED '} {text}: {value:.3g}")
    for part in figures.get("not_reached", ()):
        print(f"not reached in {args.within:g} s: {part}")
    run = record("benchmarks.kernels", dataclasses.asdict(settings), arguments, threads=args.threads, note=args.note)
    run["device"] = machine.describe()
    publish({"run": run, "bars": {text: value for text, (value, _) in bars.items()}, **figures}, args.out)
    return 0 if all(reached for _, reached in bars.values()) else 1


def _tables(figures: Figures) -> list[str]:
    writers = (scoring_table, measuring_table, compaction_table, steps_table)
    return [write(figures[name]) for write, name in zip(writers, list(figures)[:4], strict=True) if figures[name]]


def _settings(args: argparse.Namespace) -> Settings:
    names = ("buffer", "layers", "heads", "query_heads", "dim", "window", "page_size", "layout", "dtype")
    return Settings(
        lengths=tuple(args.lengths),
        requests=tuple(args.requests),
        repeats=3 if args.quick else args.repeats,
        seconds=min(0.25, args.seconds) if args.quick else args.seconds,
        # A quick run compares backends with each other at single requests only.
        others_at=1 if args.quick else max(args.requests),
        **{name: getattr(args, name) for name in names},
    )


def _complete(args: argparse.Namespace, device: str | None) -> None:
    """Choose the device, and its defaults for what was not given."""
    args.device = device or args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[args.device] | ({"lengths": [640, 1152]} if args.quick and args.device == "cpu" else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(DEFAULTS), help="default: a GPU if PyTorch sees one")
    group = parser.add_argument_group("sizes", "Defaults are those of an 8B model, on a CPU with 4 layers.")
    group.add_argument("--lengths", type=int, nargs="+", metavar="L", help="tokens held")
    group.add_argument("--requests", type=int, nargs="+", metavar="R", help="requests in one call")
    group.add_argument("--tokens", type=int, nargs="+", metavar="T", help="tokens of a step")
    group.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    group.add_argument("--layers", type=int)
    group.add_argument("--buffer", type=int, default=128, help="tokens that a compaction frees")
    group.add_argument("--heads", type=int, default=8, help="kv heads")
    group.add_argument("--query-heads", type=int, default=32)
    group.add_argument("--dim", type=int, default=128, help="head size")
    group.add_argument("--window", type=int, default=8)
    group.add_argument("--page-size", type=int)
    group.add_argument("--layout", choices=["rows", "vec", "amx"], help="how pages are packed")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7, help="rounds at least")
    parser.add_argument("--seconds", type=float, help="of rounds for each row")
    parser.add_argument("--note", default="", help="something that readers of the results should know")
    parser.add_argument("--quick", action="store_true", help="few rounds; on a CPU also short lengths")
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="measure what bars are about first, and begin nothing after this time; the results name what is missing",
    )
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
