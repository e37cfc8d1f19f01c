"""`skipkv tune`: find the cheapest method and budget whose predictions on given texts stay within a limit."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import typer

from ..capacity import Capacity, as_dict
from ..config import KVPolicyConfig, flag_names
from ..core.errors import KVPolicyError
from ..evaluation import RunError, command
from ..evaluation.arms import Arm, Serve
from ..evaluation.comparison import first_changed
from ..evaluation.engine import Setup, serve
from ..evaluation.fidelity import Fidelity
from ..evaluation.report import HEAD, cells, terminal_table, write
from ..evaluation.texts import Text
from .plan import FLAGS, Machine, Plan, plan

DESCRIPTION = """Find the cheapest eviction method and budget whose predictions on your texts stay within a limit, show
how many requests then fit, and print the command to serve it. One half of the texts is used to choose, the other
to verify. Exits with 3 if no candidate stays within the limit, or the check fails. Each result is saved in --out at
once; after an interruption, run the same command again to resume."""
METHODS = ("skipkv", "snapkv", "tova", "keydiff", "streaming_llm")
RATIOS = (2, 4, 8, 16)
MAX_TEXTS = 32
LEAST_TEXTS = 2
"""Fewest texts of each half; an interval over one text would have no width."""

PROMPTS = """As in the measurement, prompts are evicted like any other text. To keep them whole, remove
--no-kv-protect-prompt and raise --kv-budget by the length of your longest prompts.

"""

ANY_MEMORY = 2.0**20
"""GiB; used for the cost of a request, which does not depend on the available memory."""

MACHINE_FIELDS = {flag[2:].replace("-", "_"): name for name, flag in FLAGS.items()} | {
    "dtype": "dtype",
    "kv_cache_dtype": "kv_dtype",
}
"""Engine argument -> field of `Machine`."""


class LimitNotHeldError(RunError):
    """No candidate stays within the limit; the message names the closest one."""

    status = 3


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser: options of `skipkv fidelity`, the limit, and the server to plan for."""
    parser = command.make_parser(prog, description=DESCRIPTION)
    parser.set_defaults(methods=list(METHODS), ratio=list(RATIOS), max_texts=MAX_TEXTS)
    group = parser.add_argument_group("choice")
    group.add_argument(
        "--max-excess",
        type=float,
        default=0.05,
        metavar="NATS",
        help="largest allowed increase of the mean loss per token over full KV, in nats; the upper end of its 95 %% "
        "interval must stay below it. 0.05 is 5 %% of perplexity",
    )
    group = parser.add_argument_group("server to plan for", "--engine gives its other arguments.")
    group.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of one GPU; needed to show how many requests fit"
    )
    group.add_argument(
        "--request-length", type=int, metavar="N", help="prompt and output tokens of a request (default: --length)"
    )
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest request (default: the model's limit)")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests at once (default: vLLM's)")
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs that share each layer")
    group.add_argument(
        "--weight-memory", type=float, metavar="GIB", help="weights on all GPUs together; needed for a quantised model"
    )
    return parser


def run(args: argparse.Namespace, words: Sequence[str], serve: Serve = serve) -> dict[str, Any]:
    """Measure, choose, print the outcome, and write `tune.json` and its plot into --out.

    Args:
        args: of `make_parser`.
        words: the command line, for the report.
        serve: starts engines.

    Returns:
        The report.

    Raises:
        KVPolicyError: bad input.
        LimitNotHeldError: no candidate stays within the limit, or the chosen one exceeds it on the other half of the
            texts; the report is written anyway.
        RunError: see `Fidelity`.
    """
    if not 0 < args.max_excess < math.inf:
        raise KVPolicyError(f"--max-excess {args.max_excess:g} is out of range; allowed: above 0")
    if args.weight_memory is not None and args.gpu_memory is None:
        raise KVPolicyError("--weight-memory is given without --gpu-memory, so it has no effect; give both")
    setup, methods, budgets, texts, settings = command.prepare(args)
    check_all_evict(setup, budgets, args.length)
    choosing, reporting = halves(texts, args.length)
    length = args.length if args.request_length is None else args.request_length
    server = server_arguments(args, setup.arguments)
    machine = machine_of(args, server)
    configs = {arm: config_of(setup, arm) for arm in (Arm(method, budget) for budget in budgets for method in methods)}
    # Before any measurement, so that a server that cannot be planned fails early.
    plans = {arm: plan(args.model, config, machine, length=length, prompt=length) for arm, config in configs.items()}

    settings |= {
        "texts": len(choosing),
        "digests": [text.digest for text in choosing],
        "reporting_digests": [text.digest for text in reporting],
        "max_excess": args.max_excess,
        "request_length": length,
        "gpu_memory": args.gpu_memory,
        "server": server,
    }
    started, fits = time.monotonic(), args.gpu_memory is not None
    measured = Fidelity(setup, methods, budgets, choosing, args.out, serve)()
    rows = [row | costs(plans[arm_of(row)].capacity, fits=fits) for row in measured["rows"]]
    outcome: dict[str, Any] = {"chosen": choose(rows, args.max_excess), "reported": None}
    if outcome["chosen"]:
        arm = arm_of(outcome["chosen"])
        alone = replace(setup, configs={name: own for name, own in setup.configs.items() if name == arm.method})
        (outcome["reported"],) = Fidelity(alone, [arm.method], [arm.budget], reporting, args.out, serve)()["rows"]
        outcome["serve"] = serve_line(args.model, configs[arm], server)
        if fits:
            outcome["capacity"] = as_dict(plans[arm].capacity)
    report = {**command.record(words, started, settings), **measured, "rows": rows, **outcome}
    typer.echo(describe(report))
    if outcome["chosen"]:
        typer.echo(describe_choice(outcome["serve"], configs[arm], plans[arm] if fits else None))
    for path in write(report, args.out / "tune"):
        typer.echo(f"wrote {path}")
    check_held(report)
    return report


def arm_of(row: Mapping[str, Any]) -> Arm:
    """Return the candidate of a row."""
    return Arm(row["method"], row["budget"])


def halves(texts: Sequence[Text], length: int) -> tuple[list[Text], list[Text]]:
    """Divide texts into those that choose and those that check the choice, alternating within each source.

    Raises:
        KVPolicyError: too few texts.
    """
    if len(texts) < 2 * LEAST_TEXTS:
        raise KVPolicyError(
            f"--texts: there are {len(texts)} different texts of --length {length}; at least {2 * LEAST_TEXTS} are "
            "needed, because one half is used to choose and the other to verify; give more text or a smaller --length"
        )
    sources = list(dict.fromkeys(text.source for text in texts))
    by_source = sorted(texts, key=lambda text: sources.index(text.source))
    return by_source[::2], by_source[1::2]


def check_all_evict(setup: Setup, budgets: Sequence[int], length: int) -> None:
    """Raise `KVPolicyError` for a budget at which no text is compacted: an excess of 0 would mean nothing."""
    for budget in budgets:
        if not first_changed(length, setup.bound(budget)):
            raise KVPolicyError(
                f"a budget of {budget} tokens (--budgets, --ratio) is out of range; allowed: up to "
                f"{length - setup.buffer - 2}, because a text of --length {length} with --buffer {setup.buffer} is "
                "never compacted above that; give smaller budgets or longer texts"
            )


def config_of(setup: Setup, arm: Arm) -> KVPolicyConfig:
    """Return the policy as measured."""
    return KVPolicyConfig.parse(setup.policy_arguments([arm.method]) | {"kv_budget": arm.budget})


def server_arguments(args: argparse.Namespace, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the server's arguments without the policy's: those of the measuring engine and those for the server."""
    given = {name: getattr(args, name) for name in ("max_model_len", "max_num_seqs", "tensor_parallel_size")}
    return {**engine} | {name: value for name, value in given.items() if value is not None}


def machine_of(args: argparse.Namespace, server: Mapping[str, Any]) -> Machine:
    """Return the machine and settings of the server.

    Raises:
        KVPolicyError: an argument of the wrong type.
    """
    planned = {name: value for name, value in server.items() if name in MACHINE_FIELDS and value is not None}
    for name, value in planned.items():
        kinds, wanted = ((str,), "a string") if name.endswith("dtype") else ((int, float), "a number")
        if type(value) not in kinds:
            raise KVPolicyError(f"--engine: {name} is {value!r}; allowed: {wanted}, because the plan needs it")
    known = {MACHINE_FIELDS[name]: value for name, value in planned.items()}
    memory = {"gpu_memory": args.gpu_memory, "weights": args.weight_memory}
    return Machine(**known | memory | {"kv_memory": ANY_MEMORY if args.gpu_memory is None else None})


def costs(found: Capacity, *, fits: bool) -> dict[str, int]:
    """Return the memory columns of a candidate's row: bytes per request and, if `fits`, the requests that fit."""
    names = ("request_bytes", "request_bytes_full", *("fit", "fit_full") * fits)
    return {name: getattr(found, name) for name in names}


def is_within(row: Mapping[str, Any], max_excess: float) -> bool:
    """Return whether the upper end of a row's interval stays within the limit; the mean alone may do so by chance."""
    return row["excess_interval"][1] <= max_excess


def choose(rows: Sequence[dict[str, Any]], max_excess: float) -> dict[str, Any] | None:
    """Return the row with the least memory per request, then the least excess, within the limit; None if none saves."""
    allowed = [row for row in rows if is_within(row, max_excess) and row["request_bytes"] < row["request_bytes_full"]]
    return min(allowed, key=lambda row: (row["request_bytes"], row["excess"]), default=None)


def serve_line(model: str, config: KVPolicyConfig, server: Mapping[str, Any]) -> str:
    """Return the command that serves the measured policy, with every option that is not at its default.

    Args:
        model: folder or name.
        config: the policy.
        server: further arguments of the engine.
    """
    policy = {"kv_policy": config.kv_policy, "kv_budget": config.kv_budget} | config.model_dump(exclude_defaults=True)
    words = ["vllm", "serve", model]
    for name, value in {**policy, **server}.items():
        flag = flag_names().get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [flag, *(each if isinstance(each, str) else json.dumps(each) for each in values)]
    return shlex.join(words)


def describe(report: Mapping[str, Any]) -> str:
    """Format all candidates, the chosen one, and its result on the other half of the texts, for a terminal."""
    settings, rows = report["settings"], sorted(report["rows"], key=lambda row: row["request_bytes"])
    limit, fits = settings["max_excess"], settings["gpu_memory"] is not None
    head = (*HEAD[:5], f"within {limit:g}", "MiB per request", "of full KV", *["requests"] * fits)
    table = [
        (
            *cells(row)[:5],
            "yes" if is_within(row, limit) else "no",
            f"{row['request_bytes'] / 2**20:,.1f}",
            f"{row['request_bytes'] / row['request_bytes_full']:.1%}",
            *([f"{row['fit']:,}"] if fits else []),
        )
        for row in rows
    ]
    parts = [
        f"{settings['texts']} texts of {settings['length']} tokens to choose, full KV {report['full_nll']:.4f} nats "
        f"per token; buffer {settings['buffer']}, window {settings['window']}, granularity {settings['granularity']}; "
        f"memory of a request of {settings['request_length']:,} tokens",
        terminal_table(head, table),
    ]
    chosen, reported = report["chosen"], report["reported"]
    if chosen is not None:
        low, high = reported["excess_interval"]
        within = "within" if is_within(reported, limit) else "NOT within"
        parts.append(
            f"Chosen: {chosen['method']} with a budget of {chosen['budget']} tokens.\n"
            f"The other {reported['texts']} texts: excess {reported['excess']:.4f} nats per token, 95 % interval "
            f"{low:.4f} to {high:.4f}; {within} the limit of {limit:g}.\n"
            f"Perplexity {math.expm1(reported['excess']):+.1%}, same top token {reported['agreement']:.1%}, divergence "
            f"{reported['divergence']:.4f}.\n"
            f"A request of {settings['request_length']:,} tokens takes {chosen['request_bytes'] / 2**20:,.1f} MiB "
            f"instead of {chosen['request_bytes_full'] / 2**20:,.1f}."
        )
    return "\n\n".join(parts)


def describe_choice(line: str, config: KVPolicyConfig, planned: Plan | None) -> str:
    """Format the command that serves the chosen candidate, with its plan if memory is known."""
    capacity = ["", "As `skipkv plan` computes it, which has more options:", *planned.lines()] if planned else []
    prompts = "" if config.policy.compacts_prompt else PROMPTS
    return "\n".join([*capacity, f"\n{prompts}{line}\n"])


def check_held(report: Mapping[str, Any]) -> None:
    """Raise `LimitNotHeldError` unless a candidate was chosen and the other half of the texts confirms it."""
    settings, rows, reported = report["settings"], report["rows"], report["reported"]
    limit = settings["max_excess"]
    if not reported:
        if any(is_within(row, limit) for row in rows):
            raise LimitNotHeldError(
                f"no candidate within --max-excess {limit:g} saves memory for a request of "
                f"{settings['request_length']} tokens; plan for longer requests (--request-length), raise the limit, "
                "or serve without a policy"
            )
        best = min(rows, key=lambda row: row["excess_interval"][1])
        raise LimitNotHeldError(
            f"no candidate stays within --max-excess {limit:g}. The best is {best['method']} at {best['budget']} with "
            f"an excess of {best['excess']:.4f}, up to {best['excess_interval'][1]:.4f}; raise the limit, give "
            "larger --budgets (smaller --ratio), or more texts, which narrow the intervals"
        )
    if not is_within(reported, limit):
        raise LimitNotHeldError(
            f"the chosen candidate exceeds --max-excess {limit:g} on the other half of the texts: its excess there is "
            f"{reported['excess']:.4f}, up to {reported['excess_interval'][1]:.4f}; it was chosen by chance or on too "
            "few texts. Give more texts, or a stricter limit"
        )


def main(prog: str, arguments: Sequence[str]) -> int:
    """Run `skipkv tune`; returns the exit status."""
    args = make_parser(prog).parse_args(list(arguments))
    return command.guarded(prog, lambda: run(args, [*prog.split(), *arguments]))
