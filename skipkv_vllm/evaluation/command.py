"""Command line of `skipkv fidelity` and `python -m benchmarks.fidelity`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import parse_json_object
from ..core.errors import KVPolicyError
from . import RunError
from .arms import Serve, budgets_of, check_methods
from .engine import Setup, serve, with_fair_random
from .fidelity import Fidelity
from .figures import pyplot
from .machine import commit, machine, relative, versions
from .report import describe, write
from .texts import Source, Text, leading_tokens, read_sources, take_in_turn

METHODS = ("skipkv", "h2o", "rkv", "snapkv", "obcache", "tova", "keydiff", "streaming_llm", "random")
DESCRIPTION = """Measure how much eviction changes a model's predictions, without grading answers: feed long texts as
prompts that are compacted like generated text, and compare the log probability of every token with full KV's. Each
result is saved in --out at once; after an interruption, run the same command again to resume."""

Defaults = Callable[[], Sequence[Source]]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default is None else super()._get_help_string(action)


def add_inputs(group: argparse._ActionsContainer, model: str | None = None) -> None:
    """Add --model and --texts to a parser or a group of options; without a default model both are required."""
    group.add_argument(
        "--model", default=model, required=model is None, help="folder of a checkpoint, or name on the Hugging Face hub"
    )
    group.add_argument(
        "--texts",
        nargs="+",
        type=Path,
        required=model is None,
        metavar="FILE",
        help='files of plain text, JSON lines with "text" or "messages", or traces (.safetensors); the documents of a '
        "file are joined and cut into texts",
    )


def make_parser(prog: str, model: str | None = None, description: str = DESCRIPTION) -> argparse.ArgumentParser:
    """Return the parser of the command, and of others that measure fidelity.

    Args:
        prog: name of the command.
        model: default of --model; None makes it and --texts required.
        description: of the command.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=HelpFormatter)
    group = parser.add_argument_group("measurement")
    add_inputs(group, model)
    group.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of each text")
    group.add_argument("--max-texts", type=int, metavar="N", help="most texts to use, taken from the files in turn")
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="NAME",
        help="eviction methods; full KV is always measured",
    )
    sizes = group.add_mutually_exclusive_group()
    sizes.add_argument("--budgets", nargs="+", type=int, metavar="N", help="budgets in tokens")
    sizes.add_argument(
        "--ratio", nargs="+", type=float, default=[4, 8, 16], metavar="R", help="budgets as --length / R"
    )
    group.add_argument("--buffer", type=int, default=128, metavar="N", help="tokens a text may grow beyond the budget")
    group.add_argument("--window", type=int, default=8, metavar="N", help="newest tokens that are always kept")
    group.add_argument(
        "--granularity",
        choices=["head", "sentence"],
        default="head",
        help="evict tokens of each KV head separately, or whole sentences",
    )
    group.add_argument(
        "--policy-config",
        default="{}",
        metavar="JSON",
        help='parameters by method, e.g. {"rkv": {"mix": 0.5}}; random keeps the first 64 tokens unless "sinks" is set',
    )
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--out", type=Path, default=Path("build/fidelity"), metavar="FOLDER", help="folder of the results"
    )
    group.add_argument("--num-seqs", type=int, default=8, metavar="N", help="texts to run at once")
    group.add_argument(
        "--engine", default="{}", metavar="JSON", help='further arguments of vllm.LLM, e.g. {"dtype": "float32"}'
    )
    return parser


def run(
    args: argparse.Namespace, command: Sequence[str], defaults: Defaults | None = None, serve: Serve = serve
) -> dict[str, Any]:
    """Measure, print the table and write `fidelity.json` and its figure into --out.

    Args:
        args: of `make_parser`.
        command: the command line, for the report.
        defaults: texts to use if --texts is not given.
        serve: starts engines.

    Returns:
        The report.

    Raises:
        KVPolicyError: bad input.
        RunError: see `Fidelity`.
    """
    setup, methods, budgets, texts, settings = prepare(args, defaults)
    started = time.monotonic()
    measured = Fidelity(setup, methods, budgets, texts, args.out, serve)()
    report = {**record(command, started, settings), **measured}
    print(describe(report))
    for path in write(report, args.out / "fidelity"):
        print(f"wrote {path}")
    return report


class Prepared(NamedTuple):
    """The checked options: arguments of `Fidelity`, and the settings for the report."""

    setup: Setup
    methods: list[str]
    budgets: list[int]
    texts: list[Text]
    settings: dict[str, Any]


def prepare(args: argparse.Namespace, defaults: Defaults | None = None) -> Prepared:
    """Check the options of `make_parser` and read the texts; see `run`.

    Raises:
        KVPolicyError: bad input.
    """
    for flag, value, low in (
        ("--length", args.length, 16),
        ("--max-texts", args.max_texts, 1),
        ("--num-seqs", args.num_seqs, 1),
    ):
        check_at_least(flag, value, low)
    pyplot()  # fail before the measurement if a package is missing
    methods, configs = check_configs(args.methods, args.policy_config)
    budgets = args.budgets or budgets_of(args.ratio, args.length)
    setup = Setup(
        relative(args.model),
        longest=args.length + 1,
        buffer=args.buffer,
        window=args.window,
        granularity=args.granularity,
        configs=configs,
        num_seqs=args.num_seqs,
        arguments=parse_json_object("--engine", args.engine),
    )
    check_methods(setup, methods, budgets, "--budgets" if args.budgets else "--ratio: budget")
    check_engine(setup, methods)
    tokenizer = load_tokenizer(args.model)
    sources = read_sources(args.texts or (), tokenizer) or list(defaults() if defaults else ())
    texts = take_in_turn(sources, tokenizer, args.length, args.max_texts)
    settings = {
        "model": setup.model,
        "texts": len(texts),
        "sources": {source.name: sum(text.source == source.name for text in texts) for source in sources},
        "digests": [text.digest for text in texts],
        "length": args.length,
        "leading_tokens": len(leading_tokens(tokenizer)),
        "methods": methods,
        "budgets": budgets,
        "buffer": args.buffer,
        "window": args.window,
        "granularity": args.granularity,
        "policy_config": configs,
        "engine": dict(setup.arguments),
    }
    return Prepared(setup, methods, budgets, texts, settings)


def record(command: Sequence[str], started: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report about its run; `started` is a reading of `time.monotonic`."""
    return {
        "command": list(command),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "settings": settings,
    }


def main(prog: str, arguments: Sequence[str]) -> int:
    """Run `skipkv fidelity`; returns the exit status."""
    args = make_parser(prog).parse_args(list(arguments))
    return guarded(prog, lambda: run(args, [*prog.split(), *arguments]))


def guarded(
    prog: str, action: Callable[[], Any], stopped: str = "results are saved; run the same command again to resume"
) -> int:
    """Run an action; turn errors into a message and an exit status: 2 for bad input, 130 for Ctrl-C, or the error's.

    Args:
        prog: name of the command.
        action: to run.
        stopped: message after Ctrl-C.
    """
    try:
        action()
    except KVPolicyError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130
    return 0


def check_at_least(flag: str, value: int | None, low: int) -> None:
    """Raise `KVPolicyError` if a flag was given (not None) with a value below `low`."""
    if value is not None and value < low:
        raise KVPolicyError(f"{flag} {value} is out of range; allowed: at least {low}")


def check_engine(setup: Setup, methods: Sequence[str]) -> None:
    """Raise `KVPolicyError` if --engine sets an argument that the run sets itself."""
    own = {"model", "kv_budget", *setup.policy_arguments(methods)}
    if taken := sorted(own & set(setup.arguments)):
        raise KVPolicyError(f"--engine: {', '.join(taken)} cannot be set here; use this command's own options")


def check_configs(methods: Sequence[str], text: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Read --policy-config; see `with_fair_random`.

    Returns:
        The methods, and the parameters by method.

    Raises:
        KVPolicyError: it is not an object of objects.
    """
    configs = parse_json_object("--policy-config", text)
    for method, config in configs.items():
        if not isinstance(config, dict):
            raise KVPolicyError(
                f"--policy-config: {method!r}: {config!r} is not an object; write parameters by method, "
                'e.g. {"rkv": {"mix": 0.5}}'
            )
    return list(methods), with_fair_random(methods, configs)


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        KVPolicyError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if model.startswith(("/", ".", "build/")) and not Path(model).is_dir():
        raise KVPolicyError(f"--model {model}: there is no such folder; give a checkpoint's folder or its hub name")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise KVPolicyError(f"--model {model}: its tokenizer cannot be loaded ({error})") from None
