"""Options of `python -m benchmarks.accuracy run`, and the settings they stand for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.figures import FULL
from skipkv_vllm.policies import policy_names

from . import UsageError
from .grid import Settings
from .tasks import DATA_SETS

REQUIRE_HELP = "fail if an answer differs between batch sizes"


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what is run, and how answers are generated."""
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
        type=json_object,
        default={},
        metavar="JSON",
        help="parameters of the first policy that is not full; the others keep their defaults",
    )
    group.add_argument(
        "--own",
        type=json_object,
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
        type=json_object,
        default={},
        metavar="JSON",
        help='arguments of vllm.LLM, e.g. {"dtype": "float32"}',
    )
    group.add_argument("--separate-arms", action="store_true", help="one arm after the other, and the time of each")


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide where and by how many engines."""
    group = parser.add_argument_group("execution")
    group.add_argument("--out", type=Path, required=True, help="folder; a stopped run in it is resumed")
    group.add_argument("--processes", type=int, default=1, help="engines at once, each on its share of the cores")
    group.add_argument("--require-batch-invariance", action="store_true", help=REQUIRE_HELP)
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes (livecodebench)"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Turn the options of `add_grid` into settings.

    Raises:
        UsageError: bad input.
    """
    same = (
        "model", "data", "split", "jsonl", "problems", "samples", "temperature", "top_p", "seed", "max_tokens",
        "buffer", "window", "granularity", "policy_config", "own", "separate_arms", "engine",
    )  # fmt: skip
    return Settings(
        **{name: getattr(args, name) for name in same},
        policies=tuple(args.policies),
        budgets=tuple(args.budgets) if set(args.policies) != {FULL} else (),
        batch_sizes=tuple(args.batch_sizes),
        problems_at=_problems_at(args.problems_at),
        protect_prompt=not args.no_protect_prompt,
        vectors=_vectors(args.steering_vectors),
        steering=tuple(args.steering),
    )


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


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object; for `type=` of an option."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); quote it for the shell") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is JSON but not an object")
    return value
