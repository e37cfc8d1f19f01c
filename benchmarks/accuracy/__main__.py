"""Command line: `run` a grid, `report` on runs, `tiny` and `steering` for the bundled model, `docs` for its page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipkv_vllm import bundled_gates
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.policies import make_policy, policy_names

from . import RunError, UsageError
from .docs import DOCS, TINY, TINY_FIGURES, write_docs, write_summary
from .grid import FULL, Settings
from .plots import draw
from .report import print_table, write_report
from .run import Run, load
from .steering import STEERING, STEERING_FIGURE, VECTOR, describe_vector, random_vectors, ways_to_steer
from .steering_plot import draw_steering
from .summary import OURS, Summary, summarise
from .tasks import DATA_SETS

TINY_POLICIES = (FULL, "skipkv", "rkv", "h2o", "snapkv", "streaming_llm", "random")
OTHERS_BUDGETS = ("25%", "60%")
OTHERS_OWN: dict[str, dict[str, Any]] = {
    # Gates are of a server, and methods about the prompt evict from it.
    "trimkv": {"policy_config": {"gates": relative(bundled_gates())}},
    "finch": {"protect_prompt": False},
    "laq": {"protect_prompt": False},
}
TINY_BUDGETS = ("12.5%", "25%", "40%", "60%")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    command = ["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        return int(args.action(args, command))
    except (UsageError, KVPolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="run | report | tiny | steering | docs")

    run = actions.add_parser(
        "run",
        help="run a grid of policies, budgets and batch sizes, and write a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.set_defaults(action=_run)
    _add_grid(run)
    _add_execution(run)

    report = actions.add_parser("report", help="write the report of finished runs again")
    report.set_defaults(action=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a run")
    report.add_argument("--out", type=Path, help="where to; default: into each run's folder")
    report.add_argument("--require-batch-invariance", action="store_true", help=REQUIRE_HELP)

    tiny = actions.add_parser(
        "tiny",
        help="the bundled model on its held-out problems; writes docs/results.md, docs/results/",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tiny.set_defaults(action=_tiny)
    tiny.add_argument("--model", help="checkpoint; default: the bundled one")
    _add_bundled(tiny, TINY_OUT)
    tiny.add_argument("--policies", nargs="+", default=list(TINY_POLICIES), metavar="POLICY")
    tiny.add_argument("--budgets", nargs="+", default=list(TINY_BUDGETS), metavar="B")
    tiny.add_argument(
        "--others",
        nargs="*",
        default=[name for name in policy_names() if name not in TINY_POLICIES],
        metavar="POLICY",
        help="methods that are shown in a table of their own",
    )
    tiny.add_argument(
        "--only-others",
        action="store_true",
        help="run --others alone; everything else stays as it stands in results/tiny.json",
    )
    tiny.add_argument("--others-budgets", nargs="+", default=list(OTHERS_BUDGETS), metavar="B", help="of --budgets")
    tiny.add_argument("--others-problems", type=int, default=100, metavar="N", help="problems of --others")
    tiny.add_argument("--problems-at-1", type=int, default=20, metavar="N", help="problems at batch size 1")
    tiny.add_argument("--buffer", type=int, default=128)
    tiny.add_argument(
        "--docs",
        type=Path,
        help=f"folder to write results.md and results/ into; default: {DOCS} for the bundled model on its held-out "
        "problems, else docs/ in --out",
    )

    _add_steering(actions)

    docs = actions.add_parser("docs", help="write docs/results.md from docs/results/tiny.json")
    docs.set_defaults(action=_docs)
    docs.add_argument("--docs", type=Path, default=DOCS)
    return parser


def _add_steering(actions: Any) -> None:
    steering = actions.add_parser(
        "steering",
        help="the bundled model's vector on its held-out problems; writes docs/results/steering.json, docs/results.md",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    steering.set_defaults(action=_steering)
    steering.add_argument("--vector", help="vector file; default: the bundled one")
    _add_bundled(steering, STEERING_OUT)
    steering.add_argument("--alpha0", nargs="+", type=float, default=list(ALPHA0), metavar="A", help="strengths")
    steering.add_argument("--gamma", type=float, default=0.02, help="of dynamic strength")
    steering.add_argument("--shown", nargs="+", type=float, default=list(SHOWN), metavar="A", help="in the tables")
    steering.add_argument("--random", type=int, default=3, metavar="N", help="random vectors of the same norm")
    steering.add_argument("--budget", default="25%", metavar="B", help="of the arms with eviction")
    steering.add_argument(
        "--docs", type=Path, help=f"default: {DOCS} for the bundled vector on held-out problems, else docs/ in --out"
    )


def _add_bundled(parser: argparse.ArgumentParser, out: Path) -> None:
    """Options of the runs on generated problems."""
    parser.add_argument("--split", default="held-out", choices=["held-out", "dev", "demo"])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=1600)
    parser.add_argument("--policy-config", type=_json_object, default={}, metavar="JSON", help="of skipkv")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="engines at once")


REQUIRE_HELP = "fail if an answer differs between batch sizes"


def _add_grid(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is run")
    group.add_argument("--model", required=True, help="path or name on the hub")
    group.add_argument("--data", required=True, choices=list(DATA_SETS), help="data set")
    group.add_argument("--jsonl", help="read the rows of --data from this file instead of the hub")
    group.add_argument("--split", help="split of the data set; default: the published one, of tiny dev")
    group.add_argument("--problems", type=int, help="the first N only")
    group.add_argument(
        "--policies", nargs="+", default=[FULL, "skipkv"], metavar="POLICY", help=", ".join(policy_names())
    )
    group.add_argument(
        "--budgets",
        nargs="+",
        default=["25%"],
        metavar="B",
        help="tokens (512), or shares (25%%) of the mean generated length of full KV at the first batch size",
    )
    group.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[16], metavar="N", help="requests that run at once"
    )
    group.add_argument(
        "--problems-at", nargs="+", default=[], metavar="SIZE=N", help="fewer problems at a batch size, e.g. 1=20"
    )
    group.add_argument("--buffer", type=int, default=128, help="kv_buffer")
    group.add_argument("--window", type=int, default=8, help="kv_window")
    group.add_argument("--granularity", choices=["head", "sentence"], default="head", help="kv_granularity")
    group.add_argument("--no-protect-prompt", action="store_true", help="evict the prompt too, as the paper does")
    group.add_argument(
        "--policy-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help="parameters of the first policy that is not full; the others keep their defaults",
    )
    group.add_argument(
        "--own",
        type=_json_object,
        default={},
        metavar="JSON",
        help='policies that need a server of their own: {"trimkv": {"policy_config": {"gates": "FILE"}}, "finch": '
        '{"protect_prompt": false}}',
    )
    group.add_argument(
        "--steering-vectors", nargs="+", default=[], metavar="NAME=FILE", help="steering vectors, for --steering"
    )
    group.add_argument(
        "--steering",
        nargs="+",
        default=[],
        metavar="STEER",
        help="also run every policy and budget steered, each as [POLICY/]NAME:ALPHA0[:GAMMA], e.g. math:1:0.02",
    )
    group = parser.add_argument_group("how answers are generated")
    group.add_argument("--samples", type=int, default=1, help="per problem; accuracy is their mean (pass@1)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0, help="of sampling")
    group.add_argument("--max-tokens", type=int, default=8192, help="generated at most, per answer")
    group.add_argument(
        "--engine",
        type=_json_object,
        default={},
        metavar="JSON",
        help='arguments of vllm.LLM, e.g. {"dtype": "float32"}',
    )
    group.add_argument("--separate-arms", action="store_true", help="one arm after the other, and the time of each")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument("--out", type=Path, required=True, help="folder; a stopped run in it is resumed")
    group.add_argument("--processes", type=int, default=1, help="engines at once, each on its share of the cores")
    group.add_argument("--require-batch-invariance", action="store_true", help=REQUIRE_HELP)
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes (livecodebench)"
    )


def _run(args: argparse.Namespace, command: Sequence[str]) -> int:
    settings = Settings(
        model=args.model,
        data=args.data,
        policies=tuple(args.policies),
        budgets=tuple(args.budgets) if set(args.policies) != {FULL} else (),
        batch_sizes=tuple(args.batch_sizes),
        split=args.split,
        jsonl=args.jsonl,
        problems=args.problems,
        problems_at=_problems_at(args.problems_at),
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        buffer=args.buffer,
        window=args.window,
        granularity=args.granularity,
        protect_prompt=not args.no_protect_prompt,
        policy_config=args.policy_config,
        own=args.own,
        separate_arms=args.separate_arms,
        engine=args.engine,
        vectors=_vectors(args.steering_vectors),
        steering=tuple(args.steering),
    )
    _execute(settings, args.out, args.processes, args.allow_code_execution, command)
    summary = _load_summary(args.out)
    page = write_report(summary, args.out)
    print_table(summary, print)
    print(f"\nreport: {page}")
    return _batch_invariance(summary, args.require_batch_invariance)


def _execute(settings: Settings, out: Path, processes: int, allow_code: bool, command: Sequence[str]) -> None:
    if settings.model.startswith(("/", ".")) and not Path(settings.model).is_dir():
        raise UsageError(f"--model {settings.model}: there is no such folder; give a checkpoint's folder or its name")
    for name in settings.policies:
        served = settings.of(name) if name in settings.own else settings.shared
        make_policy(name, served.policy_config if served.evicting[:1] == (name,) else {}).check_complete()
    Run(settings, out, processes=processes, allow_code_execution=allow_code, command=command)()


def _load_summary(out: Path) -> Summary:
    return summarise(*load(out))


def _report(args: argparse.Namespace, command: Sequence[str]) -> int:
    status = 0
    for folder in args.folders:
        summary = _load_summary(folder)
        out = folder if args.out is None else args.out / folder.name
        print_table(summary, print)
        print(f"\nreport: {write_report(summary, out)}")
        status = max(status, _batch_invariance(summary, args.require_batch_invariance))
    return status


def _tiny(args: argparse.Namespace, command: Sequence[str]) -> int:
    from skipkv_vllm import bundled_model

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
    published = args.model is None and args.split == "held-out"
    args.docs = args.docs or (DOCS if published else args.out / "docs")
    results = args.docs / TINY.parent
    if args.only_others:
        if not (args.docs / TINY).exists():
            raise UsageError(f"--only-others adds to {args.docs / TINY}, which does not exist; leave it out")
        summary = json.loads((args.docs / TINY).read_text())
    else:
        _execute(settings, args.out, args.processes, False, command)
        summary = _load_summary(args.out)
        draw(summary, results, TINY_FIGURES)
        write_report(summary, args.out)
        print_table(summary, print)
    if args.others:
        summary["others"] = _tiny_others(args, settings, summary, command)
    write_summary(summary, args.docs / TINY)
    if args.others:
        print_table(summary["others"], print)
    print(f"\nreport: {args.out / 'report.html'}; docs: {write_docs(args.docs)}")
    return _batch_invariance(summary, required=True)


def _tiny_others(args: argparse.Namespace, main: Settings, summary: Summary, command: Sequence[str]) -> Summary:
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
    _execute(settings, out, args.processes, False, command)
    return _load_summary(out)


def _steering(args: argparse.Namespace, command: Sequence[str]) -> int:
    from skipkv_vllm import bundled_model, bundled_vector
    from skipkv_vllm.steering import SteeringVector

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
    _execute(settings, args.out, args.processes, False, command)
    summary = _load_summary(args.out) | {"vector": describe_vector(file), "shown": args.shown}
    published = args.vector is None and args.split == "held-out"
    docs = args.docs or (DOCS if published else args.out / "docs")
    write_summary(summary, docs / STEERING)
    draw_steering(summary, docs / STEERING.parent / STEERING_FIGURE)
    print_table(summary, print)
    print(f"\nwrote {docs / STEERING}" + (f" and {write_docs(docs)}" if (docs / TINY).exists() else ""))
    return 0


def _docs(args: argparse.Namespace, command: Sequence[str]) -> int:
    print(f"wrote {write_docs(args.docs)}")
    return 0


def _batch_invariance(summary: Summary, required: bool) -> int:
    """Say what the batch size changed; 1 if that is not allowed."""
    changed = [row for row in summary["batch_invariance"] if row["other_answer"]]
    for row in changed:
        first, other = row["batch_sizes"]
        print(
            f"{'error: ' if required else ''}{row['policy']} {row['budget'] or ''}: {row['other_answer']} of "
            f"{row['compared']} answers differ between batch sizes {first} and {other}",
            file=sys.stderr,
        )
    return int(required and bool(changed))


def _vectors(pairs: Sequence[str]) -> dict[str, str]:
    vectors = dict(pair.partition("=")[::2] for pair in pairs)
    if len(vectors) < len(pairs) or not all(vectors) or not all(vectors.values()):
        raise UsageError(f"--steering-vectors {' '.join(pairs)}: write NAME=FILE, each name once")
    return vectors


def _problems_at(values: Sequence[str]) -> dict[int, int]:
    try:
        pairs = [value.split("=") for value in values]
        return {int(size): int(count) for size, count in pairs}
    except ValueError:
        raise UsageError(f"--problems-at {' '.join(values)}: write SIZE=N, e.g. --problems-at 1=20") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); quote it for the shell") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is JSON but not an object")
    return value


if __name__ == "__main__":
    sys.exit(main())
