"""Command line: `run` a grid and `report` on runs; `tiny` and `steering` measure the bundled model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results.store import Summary
from skipkv_vllm.evaluation.command import guarded

from . import RunError, bundled
from .options import REQUIRE_HELP, add_execution, add_grid, settings_of
from .report import print_table, write_report
from .run import execute
from .summary import changed_answers, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    command = [*parser.prog.split(), *(sys.argv[1:] if arguments is None else arguments)]
    return guarded(parser.prog, lambda: args.action(args, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="run | report | tiny | steering")

    run = actions.add_parser(
        "run",
        help="run a grid of policies, budgets and batch sizes, and write a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.set_defaults(action=_run)
    add_grid(run)
    add_execution(run)

    report = actions.add_parser("report", help="write the report of finished runs again")
    report.set_defaults(action=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a run")
    report.add_argument("--out", type=Path, help="where to; default: into each run's folder")
    report.add_argument("--require-batch-invariance", action="store_true", help=REQUIRE_HELP)

    bundled.add_tiny(actions)
    bundled.add_steering(actions)
    return parser


def _run(args: argparse.Namespace, command: Sequence[str]) -> None:
    settings = settings_of(args)
    execute(settings, args.out, command, processes=args.processes, allow_code_execution=args.allow_code_execution)
    _show([(read_run(args.out), args.out)], args.require_batch_invariance)


def _report(args: argparse.Namespace, command: Sequence[str]) -> None:
    folders = [(folder, folder if args.out is None else args.out / folder.name) for folder in args.folders]
    _show(((read_run(folder), out) for folder, out in folders), args.require_batch_invariance)


def _show(reports: Iterable[tuple[Summary, Path]], require_batch_invariance: bool) -> None:
    """Print and write reports; then name the answers that changed with the batch size.

    Raises:
        RunError: an answer changed, and none may.
    """
    changed = []
    for summary, out in reports:
        page = write_report(summary, out)
        print_table(summary, print)
        print(f"\nreport: {page}")
        changed += changed_answers(summary)
    if changed and require_batch_invariance:
        raise RunError("\n".join(changed))
    for line in changed:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
