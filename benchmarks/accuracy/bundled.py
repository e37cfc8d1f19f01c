"""The bundled model on generated problems: the commands `tiny` and `steering`, which write pages of results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.results.pages import publish
from benchmarks.results.plots.accuracy import draw
from benchmarks.results.plots.steering import draw_steering
from benchmarks.results.sections.accuracy import PREFIX
from benchmarks.results.sections.steering import FIGURE
from benchmarks.results.store import DOCS, RESULTS, STEERING, TINY, Summary, read_summary
from skipkv_vllm import bundled_gates, bundled_model, bundled_vector
from skipkv_vllm.evaluation.figures import FULL, OURS
from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.policies import policy_names
from skipkv_vllm.steering import SteeringVector

from . import RunError, UsageError
from .grid import Settings
from .options import json_object
from .report import print_table, write_report
from .run import execute
from .steering import VECTOR, describe_vector, random_vectors, ways_to_steer
from .summary import changed_answers, read_run

TINY_POLICIES = (FULL, "skipkv", "rkv", "h2o", "snapkv", "streaming_llm", "random")
TINY_BUDGETS = ("12.5%", "25%", "40%", "60%")
OTHERS_BUDGETS = ("25%", "60%")
OTHERS_OWN: dict[str, dict[str, Any]] = {
    # Gates belong to a server, and methods that compress prompts evict from them.
    "trimkv": {"policy_config": {"gates": relative(bundled_gates())}},
    "finch": {"protect_prompt": False},
    "laq": {"protect_prompt": False},
}
# For a model this small the engine's own work is most of a step: vLLM's C++ operators instead of PyTorch's, and no
# queue between the scheduler and a worker in the same thread.
TINY_ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "block_size": 32,
    "enforce_eager": True,
    "async_scheduling": False,
    "compilation_config": {"custom_ops": ["all"]},
}
TINY_OUT = Path("build/eval/tiny")

# Shown are the published strength and a weak one. Of 200 dev problems dynamic steering with and without eviction lost
# none at 0.4 and 0.45; at 0.5 and 0.55 eviction lost one and six.
ALPHA0 = (0.25, 0.45, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0)
SHOWN = (0.45, 1.0)
STEERING_OUT = Path("build/eval/steering")


def add_tiny(actions: Any) -> None:
    """Add the command `tiny` to a parser's commands."""
    parser = _add_command(
        actions, "tiny", tiny, TINY_OUT, "the bundled model on its held-out problems; writes docs/results/"
    )
    parser.add_argument("--model", help="checkpoint; default: the bundled one")
    parser.add_argument("--policies", nargs="+", default=list(TINY_POLICIES), metavar="POLICY")
    parser.add_argument("--budgets", nargs="+", default=list(TINY_BUDGETS), metavar="B")
    parser.add_argument(
        "--others",
        nargs="*",
        default=[name for name in policy_names() if name not in TINY_POLICIES],
        metavar="POLICY",
        help="methods that are shown in a table of their own",
    )
    parser.add_argument(
        "--only-others", action="store_true", help="run --others alone; keep everything else in results/tiny.json"
    )
    parser.add_argument("--others-budgets", nargs="+", default=list(OTHERS_BUDGETS), metavar="B", help="of --budgets")
    parser.add_argument("--others-problems", type=int, default=100, metavar="N", help="problems of --others")
    parser.add_argument("--problems-at-1", type=int, default=20, metavar="N", help="problems at batch size 1")
    parser.add_argument("--buffer", type=int, default=128)


def add_steering(actions: Any) -> None:
    """Add the command `steering` to a parser's commands."""
    parser = _add_command(
        actions, "steering", steering, STEERING_OUT, "the bundled vector on held-out problems; writes docs/results/"
    )
    parser.add_argument("--vector", help="vector file; default: the bundled one")
    parser.add_argument("--alpha0", nargs="+", type=float, default=list(ALPHA0), metavar="A", help="strengths")
    parser.add_argument("--gamma", type=float, default=0.02, help="of dynamic strength")
    parser.add_argument("--shown", nargs="+", type=float, default=list(SHOWN), metavar="A", help="in the tables")
    parser.add_argument("--random", type=int, default=3, metavar="N", help="random vectors of the same norm")
    parser.add_argument("--budget", default="25%", metavar="B", help="of the arms with eviction")


def _add_command(actions: Any, name: str, action: Any, out: Path, text: str) -> argparse.ArgumentParser:
    """Add a command with the options that both have."""
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(action=action)
    parser.add_argument("--split", default="held-out", choices=["held-out", "dev", "demo"])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=1600)
    parser.add_argument("--policy-config", type=json_object, default={}, metavar="JSON", help="of skipkv")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="engines at once")
    parser.add_argument(
        "--docs",
        type=Path,
        help=f"folder to write results/ into; default: {DOCS} for what is bundled, on held-out problems; otherwise "
        "docs/ in --out",
    )
    return parser


def _docs(args: argparse.Namespace, given: str | None) -> Path:
    """The folder of documentation: the published one only for the bundled files on held-out problems."""
    published = given is None and args.split == "held-out"
    chosen: Path | None = args.docs
    return chosen or (DOCS if published else args.out / "docs")


def tiny(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Run `tiny`.

    Raises:
        RunError: the run failed, or an answer differs between batch sizes.
        UsageError: bad input.
    """
    settings = Settings(
        model=args.model or relative(bundled_model()),
        data="tiny",
        policies=tuple(args.policies),
        budgets=tuple(args.budgets),
        batch_sizes=(16, 1),
        split=args.split,
        problems=args.problems,
        problems_at={1: args.problems_at_1},
        max_tokens=args.max_tokens,
        buffer=args.buffer,
        policy_config=args.policy_config,
        engine=TINY_ENGINE,
    )
    docs = _docs(args, args.model)
    if args.only_others:
        if not (docs / TINY).exists():
            raise UsageError(f"--only-others adds to {docs / TINY}, which does not exist; leave it out")
        summary = read_summary(docs / TINY)
    else:
        execute(settings, args.out, command, processes=args.processes)
        summary = read_run(args.out)
        draw(summary, docs / RESULTS, PREFIX)
        write_report(summary, args.out)
        print_table(summary, print)
    if args.others:
        summary["others"] = _others(args, settings, summary, command)
        print_table(summary["others"], print)
    print(f"\nreport: {args.out / 'report.html'}")
    publish(summary, docs / TINY, docs)
    if changed := changed_answers(summary):
        raise RunError("\n".join(changed))


def _others(args: argparse.Namespace, main: Settings, summary: Summary, command: Sequence[str]) -> Summary:
    """Run the methods that have a table of their own, at budgets of the main run."""
    tokens = summary["run"]["budgets"]
    if unknown := [text for text in args.others_budgets if text not in tokens]:
        raise UsageError(f"--others-budgets {' '.join(unknown)}: name some of --budgets: {', '.join(tokens)}")
    settings = replace(
        main,
        policies=tuple(args.others),
        budgets=tuple(str(tokens[text]) for text in args.others_budgets),
        problems=min(args.others_problems, args.problems),
        problems_at={1: min(2, args.problems_at_1)},
        policy_config={},
        own={name: own for name, own in OTHERS_OWN.items() if name in args.others},
    )
    out = args.out / "others"
    execute(settings, out, command, processes=args.processes)
    return read_run(out)


def steering(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Run `steering`.

    Raises:
        RunError: the run failed.
        UsageError: bad input.
    """
    file = args.vector or relative(bundled_vector())
    random = random_vectors(SteeringVector.load(file), args.random, args.out / "random")
    settings = Settings(
        model=relative(bundled_model()),
        data="tiny",
        policies=(FULL, OURS),
        budgets=(args.budget,),
        batch_sizes=(16,),
        split=args.split,
        problems=args.problems,
        max_tokens=args.max_tokens,
        policy_config=args.policy_config,
        engine=TINY_ENGINE,
        vectors={VECTOR: file} | random,
        steering=tuple(ways_to_steer(args.alpha0, args.gamma, random, args.shown)),
    )
    execute(settings, args.out, command, processes=args.processes)
    summary = read_run(args.out) | {"vector": describe_vector(file), "shown": args.shown}
    docs = _docs(args, args.vector)
    draw_steering(summary, docs / RESULTS / FIGURE)
    print_table(summary, print)
    publish(summary, docs / STEERING, docs)
