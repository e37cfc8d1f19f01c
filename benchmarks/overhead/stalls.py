"""How long a step takes when many requests come due together, by the limit of compactions in a step.

    python -m benchmarks.overhead.stalls --batch-size 64 --limits 1 4 16 64

Requests of equal prompts start together, so they reach the bound in the same step, again and again if no limit parts
them. An engine for each limit, in a process of its own, runs the same requests in turns. Printed for each: the median
step, the longest step as a multiple of it, and the tokens per second as a ratio to the engine of the last limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import remote
from benchmarks.remote import answer_orders
from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.children import attended
from skipkv_vllm.evaluation.command import guarded
from skipkv_vllm.evaluation.machine import relative

PROMPT = 32
ROUND = 3
"""buffers that a round goes on for after the first compactions"""


class Round(NamedTuple):
    """Seconds of each step from the first compaction on, and compactions."""

    seconds: list[float]
    num_compactions: int


class Engine:
    """A vLLM engine in this process that compacts at most `limit` requests in a step."""

    def __init__(self, limit: int, args: argparse.Namespace) -> None:
        from skipkv_vllm import LLM

        self.args = args
        self.llm = LLM(
            args.model,
            dtype=args.dtype,
            max_num_seqs=args.batch_size,
            max_model_len=2048,
            block_size=32,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            max_num_batched_tokens=max(2048, PROMPT * args.batch_size),
            kv_policy=args.policy,
            kv_budget=args.budget,
            kv_buffer=args.buffer,
            kv_compactions_per_step=limit,
        )

    def round(self) -> Round:
        """Run all requests from their start to their end."""
        from vllm import SamplingParams

        engine, args = self.llm.llm_engine, self.args
        length = args.budget + (ROUND + 1) * args.buffer
        params = SamplingParams(max_tokens=length - PROMPT, temperature=0, ignore_eos=True, detokenize=False)
        for i in range(args.batch_size):
            prompt = [20 + (7 * i + 13 * j) % 400 for j in range(PROMPT)]
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        runtime = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.runtime
        seconds, before = [], runtime.num_compactions
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            engine.step()
            if runtime.num_compactions > before:
                seconds.append(time.perf_counter() - started)
        return Round(seconds, runtime.num_compactions - before)


def work(connection: Connection, limit: int, args: argparse.Namespace, log: Path) -> None:
    """Body of an engine's process."""
    with attended(connection, log):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        engine = Engine(limit, args)
        answer_orders(connection, lambda order: engine.round())


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Let the engines take turns; a row of figures for each limit."""
    engines: dict[int, remote.Remote] = {}
    rounds: dict[int, list[Round]] = {limit: [] for limit in args.limits}
    try:
        for limit in args.limits:
            engines[limit] = remote.Remote(work, (limit, args), folder / f"{limit}.log")
        for number in range(args.rounds + 1):
            for limit in args.limits if number % 2 else reversed(args.limits):
                found = engines[limit].ask("round")
                if number:  # the first round warms up
                    rounds[limit].append(found)
    finally:
        for engine in engines.values():
            engine.stop()
    last = rounds[args.limits[-1]]
    rows = []
    for limit, of_limit in rounds.items():
        if any(each.num_compactions < args.batch_size * ROUND for each in of_limit):
            raise RunError("hardly any compaction took place; these are not figures of eviction")
        rows.append(
            {
                "limit": limit,
                "compactions": of_limit[0].num_compactions,
                "median_ms": 1000 * median(median(each.seconds) for each in of_limit),
                "longest": median(max(each.seconds) / median(each.seconds) for each in of_limit),
                "speed": median(sum(b.seconds) / sum(a.seconds) for a, b in zip(of_limit, last, strict=True)),
            }
        )
    return rows


def run(args: argparse.Namespace, arguments: Sequence[str] | None) -> None:
    """Measure, print, and write the figures if asked to."""
    with tempfile.TemporaryDirectory(prefix="skipkv-stalls-") as folder:
        rows = measure(args, Path(folder))
    print(f"{'limit':>6}{'median ms':>11}{'longest / median':>18}{'speed':>8}{'compactions':>13}")
    for row in rows:
        print(
            f"{row['limit']:6}{row['median_ms']:11.2f}{row['longest']:18.2f}{row['speed']:8.3f}{row['compactions']:13}"
        )
    if args.out:
        settings = vars(args) | {"model": relative(args.model), "out": str(args.out)}
        publish({"run": record("benchmarks.overhead.stalls", settings, arguments), "limits": rows}, args.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead.stalls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--policy", default="skipkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limits", type=int, nargs="+", default=[1, 4, 16, 64], help="the last one is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    if args.policy == "full":
        parser.error("--policy full evicts nothing")
    if args.budget + (ROUND + 1) * args.buffer > 2048:
        parser.error(f"--budget {args.budget} and {ROUND + 1} times --buffer {args.buffer} exceed 2,048 tokens")
    return guarded(parser.prog, lambda: run(args, arguments), stopped="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
