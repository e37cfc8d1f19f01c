"""Command line of the check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import prepare, run, steps

FOLDER = Path("build/gpu-check")
"""Where prepared files and results lie; git ignores it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare or run the check; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["prepare"]:
        args = _preparing().parse_args(given[1:])
        return prepare.prepare(args.folder, architecture=args.architecture, builds=not args.without_build)
    args = _running().parse_args(given[1:] if given[:1] == ["run"] else given)
    return run.run(run.Options(**vars(args)))


def _preparing() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh prepare",
        description="Gather what a bare CUDA machine lacks: our libraries, wheels, vLLM's Triton attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to")
    parser.add_argument("--architecture", default="90a", help="of the CUDA machine; 90a for H100 and H200")
    parser.add_argument("--without-build", action="store_true", help="keep the libraries that are there already")
    return parser


def _running() -> argparse.ArgumentParser:
    table = "\n".join(f"  {step.number:2}  {step.limit:3} s  {step.question}" for step in steps.STEPS)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description=f"Check this machine. Steps, with their limits:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with the prepared files")
    parser.add_argument("--out", type=Path, help="the results, JSON; default: results.json in the folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is a GPU")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--steps", type=int, nargs="+", metavar="N", help="only these")
    chosen.add_argument("--only-most-important", action="store_true", help="only 0, 2, 7 and 8")
    parser.add_argument("--total", type=int, default=run.TOTAL, metavar="SECONDS", help="limit on all steps together")
    parser.add_argument("--tiny", action="store_true", help="few cases and small sizes, to test the check on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
