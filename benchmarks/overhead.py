"""What eviction costs a decode step: stock vLLM and an evicting engine at equal resident lengths, in turns.

    python -m benchmarks.overhead --budgets 256 1024 --batch-sizes 1 16

Each engine has a process of its own and all cores while it works; the other one waits. The stock engine starts fresh
requests of `budget` tokens and decodes `buffer` steps, so it holds budget to budget + buffer tokens a request. The
evicting one goes on decoding long requests, which hold the same after their first compaction, and every stretch of
`buffer` steps has one compaction of each request in it. Prefills are not timed.

    python -m benchmarks.overhead --steering

measures steering in the same way, without eviction: a server with a vector that steers every request, and one whose
requests are not steered. The vector is so short that all engines write the same text.

    python -m benchmarks.overhead --layers 8 --hidden-size 768 --budgets 256

measures a model of that size with random weights: what it writes means nothing, but a step takes what it would take. A
step grows with the number of weights, a compaction with the size of the KV cache only, so the bundled model, which has
hardly any weights, is the worst case.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation.machine import provenance, relative
from skipkv_vllm.ops import STATE
from skipkv_vllm.steering import SteeringVector

from .accuracy.docs import write_summary

ARMS = ("stock", "evicting")
STEERING_ARMS = ("stock", "steered", "idle")
LONGEST = 4000  # tokens of a request
TURN = 16  # steps of one engine before the other has its turn


class Shape(NamedTuple):
    """One measurement: tokens kept a request, and requests at once."""

    budget: int
    batch_size: int


def work(connection: Connection, arm: str, shape: Shape, args: argparse.Namespace, log: str) -> None:
    """Body of an engine's process. Takes `("start",)`, `("steps", n)` -> seconds, `("steered",)`, or None to end."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    try:
        engine = Engine(arm, shape, args)
        gc.collect()
        gc.freeze()
        connection.send(None)
        while (order := connection.recv()) is not None:
            connection.send(getattr(engine, order[0])(*order[1:]))
    except Exception as error:
        connection.send(error)
        raise


class Engine:
    """A vLLM engine in this process, with requests that never end by themselves."""

    def __init__(self, arm: str, shape: Shape, args: argparse.Namespace) -> None:
        import vllm
        from vllm.tokenizers import cached_tokenizer_from_config

        from skipkv_vllm import LLM

        arguments: dict[str, Any] = {
            "dtype": args.dtype,
            "max_num_seqs": shape.batch_size,
            "max_model_len": 4096,
            "block_size": 32,
            "enforce_eager": not args.compiled,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "max_num_batched_tokens": 4096,
        }
        self.evicts = arm == "evicting"
        if args.steering and arm != "stock":
            vectors, default = {"bench": args.vector}, "bench" if arm == "steered" else "off"
            self.llm = LLM(args.model, **arguments, kv_steering_vectors=vectors, kv_steering_default=default)
        elif self.evicts:
            policy = {"kv_policy": args.policy, "kv_budget": shape.budget, "kv_buffer": args.buffer}
            self.llm = LLM(args.model, **arguments, **policy)
        else:
            self.llm = vllm.LLM(args.model, **arguments)
        self.shape, self.buffer = shape, args.buffer
        config = self.llm.llm_engine.vllm_config.model_config
        # A running text with sentences in it, so that the tracker has what it usually has.
        text = "Wait, is that right?\n\nRead c = 3 + 1, so c: 4.\n\nSo b holds.\n\n" * 200
        tokenizer = cached_tokenizer_from_config(config)
        self.ids = tokenizer.encode(text)
        # Only who thinks is steered.
        self.opening = tokenizer.encode("<think>") if args.steering else []
        self.number = 0

    def start(self) -> int:
        """(Re)start all requests and bring them to the point where measuring begins; compactions so far."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            if self.evicts and self._room():
                return self._compactions()
            scheduler = engine.engine_core.engine_core.scheduler
            engine.abort_request(list(scheduler.requests), internal=True)
            while engine.has_unfinished_requests():
                engine.step()
        params = SamplingParams(max_tokens=LONGEST, temperature=0, ignore_eos=True, detokenize=False)
        for i in range(self.shape.batch_size):
            # Requests of a server are at different points between two compactions.
            length = self.shape.budget + (self.buffer * i // self.shape.batch_size if self.evicts else 0)
            # The protected prompt is short: it is text that the model could have written.
            written = self.ids[i : i + (length if not self.evicts else min(64, length)) - len(self.opening)]
            prompt = {"prompt_token_ids": self.opening + written}
            engine.add_request(str(self.number), prompt, params)
            self.number += 1
            if self.evicts and i + 1 < self.shape.batch_size:
                self.steps(max(1, self.buffer // self.shape.batch_size))
        # Until every request was compacted, and for the stock engine until all prompts are in.
        ready = self.shape.batch_size * (1 if self.evicts else 0)
        before = self._compactions()
        scheduler = engine.engine_core.engine_core.scheduler
        while any(r.num_output_tokens == 0 for r in scheduler.requests.values()):
            self.steps(1)
        while self.evicts and self._compactions() - before < ready:
            self.steps(1)
        return self._compactions()

    def _room(self) -> bool:
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        return all(request.num_tokens + 2 * self.buffer < LONGEST for request in scheduler.running)

    def _compactions(self) -> int:
        if not self.evicts:
            return 0
        return int(self._runtime().num_compactions)

    def _runtime(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.runtime

    def steered(self) -> int:
        """Tokens steered of the requests that run."""
        steering = self._runtime().steering
        return int(steering.state[:, STATE.index("steered")].sum()) if steering._requests else 0

    def steps(self, count: int) -> float:
        """Run steps; seconds."""
        engine = self.llm.llm_engine
        started = time.perf_counter()
        for _ in range(count):
            engine.step()
        return time.perf_counter() - started


class Remote:
    """An engine in another process."""

    def __init__(self, arm: str, shape: Shape, args: argparse.Namespace, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.log = folder / f"{arm}-{shape.budget}-{shape.batch_size}.log"
        self.process = context.Process(target=work, args=(there, arm, shape, args, str(self.log)), daemon=True)
        self.process.start()
        there.close()
        self.receive()

    def receive(self) -> Any:
        """The next message; exits with the engine's error."""
        try:
            message = self.connection.recv()
        except EOFError:
            message = RuntimeError("the engine died")
        if isinstance(message, Exception):
            sys.exit(f"error: {message}; log: {self.log}\n" + "\n".join(self.log.read_text().splitlines()[-12:]))
        return message

    def ask(self, *order: Any) -> Any:
        """Send an order and wait for the answer."""
        self.connection.send(order)
        return self.receive()

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join(20)


def measure(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Step times of both engines, as a ratio of each round of `buffer` steps."""
    engines = {arm: Remote(arm, shape, args, folder) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    compactions = 0
    for number in range(args.rounds + 1):
        before = {arm: engine.ask("start") for arm, engine in engines.items()}["evicting"]
        total = dict.fromkeys(ARMS, 0.0)
        for _ in range(args.buffer // TURN):
            for arm in ARMS if number % 2 else reversed(ARMS):
                total[arm] += engines[arm].ask("steps", TURN)
        if number:  # the first round warms up
            for arm in ARMS:
                seconds[arm].append(total[arm])
            compactions += engines["evicting"].ask("start") - before
    for engine in engines.values():
        engine.stop()
    ratios = sorted(b / a for a, b in zip(seconds["stock"], seconds["evicting"], strict=True))
    return {
        "budget": shape.budget,
        "batch_size": shape.batch_size,
        "rounds": args.rounds,
        "compactions": compactions,
        "stock_ms": 1000 * median(seconds["stock"]) / args.buffer,
        "evicting_ms": 1000 * median(seconds["evicting"]) / args.buffer,
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def measure_steering(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds per step of steered and unsteered requests, as ratios of each round of `buffer` steps."""
    engines = {arm: Remote(arm, shape, args, folder) for arm in STEERING_ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in STEERING_ARMS}
    steered = 0
    for number in range(args.rounds + 1):
        for engine in engines.values():
            engine.ask("start")
        total = dict.fromkeys(STEERING_ARMS, 0.0)
        for turn in range(args.buffer // TURN):
            first = (number + turn) % len(STEERING_ARMS)
            for arm in STEERING_ARMS[first:] + STEERING_ARMS[:first]:
                total[arm] += engines[arm].ask("steps", TURN)
        if number:  # the first round warms up
            for arm in STEERING_ARMS:
                seconds[arm].append(total[arm])
            steered += engines["steered"].ask("steered")
    for engine in engines.values():
        engine.stop()
    row: dict[str, Any] = {
        "length": shape.budget,
        "batch_size": shape.batch_size,
        "rounds": args.rounds,
        "steered_tokens": steered,
    }
    for arm in STEERING_ARMS:
        row[f"{arm}_ms"] = 1000 * median(seconds[arm]) / args.buffer
        ratios = sorted(b / a for a, b in zip(seconds["stock"], seconds[arm], strict=True))
        row |= {f"{arm}_ratio": median(ratios), f"{arm}_low": ratios[0], f"{arm}_high": ratios[-1]}
    return row


def short_vector(model: str, folder: Path) -> str:
    """A file with a vector that changes nothing that a float32 model writes."""
    config = AutoConfig.from_pretrained(model)
    path = folder / "short.safetensors"
    SteeringVector(
        values=torch.full((config.hidden_size,), 1e-6),
        layer=config.num_hidden_layers // 2,
        num_layers=config.num_hidden_layers,
        base_model=relative(model),
        method="benchmark",
    ).save(path)
    return str(path)


def random_model(like: str, layers: int, hidden_size: int, folder: Path) -> str:
    """Write a model of another size with random weights, 4 heads of 64 to a kv head, and another's tokenizer.

    Returns:
        Its folder.
    """
    own = folder / "model"
    AutoTokenizer.from_pretrained(like).save_pretrained(own)
    config = AutoConfig.from_pretrained(like)
    config.update(
        {
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "head_dim": 64,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 256,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(own)
    return str(own)


def steering_table(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure and print every shape.

    Raises:
        SystemExit: hardly anything was steered.
    """
    args.vector = short_vector(args.model, folder)
    heads = f"{'length':>6}{'batch':>7}{'stock ms':>10}{'steered':>9}{'from - to':>16}"
    print(f"{heads}{'idle':>9}{'from - to':>16}{'tokens':>8}")
    rows = []
    for length in args.budgets:
        for batch_size in args.batch_sizes:
            row = measure_steering(Shape(length, batch_size), args, folder)
            rows.append(row)
            spread = {arm: f"{row[f'{arm}_low']:.3f} - {row[f'{arm}_high']:.3f}" for arm in STEERING_ARMS}
            print(
                f"{length:6}{batch_size:7}{row['stock_ms']:10.2f}{row['steered_ratio']:9.3f}{spread['steered']:>16}"
                f"{row['idle_ratio']:9.3f}{spread['idle']:>16}{row['steered_tokens']:8}",
                flush=True,
            )
            if row["steered_tokens"] < batch_size * args.rounds:
                sys.exit("error: hardly any token was steered; these are not figures of steering")
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--policy", default="skipkv")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default graphs instead of eager mode")
    parser.add_argument("--steering", action="store_true", help="measure steering instead of eviction")
    parser.add_argument("--layers", type=int, help="with --hidden-size: of a model with random weights")
    parser.add_argument("--hidden-size", type=int, help="a multiple of 256; see --layers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, e.g. docs/results/overhead.json")
    args = parser.parse_args()
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
    if args.steering and args.layers is not None:
        parser.error("--steering is measured on --model; leave --layers and --hidden-size out")
    settings = {**vars(args), "model": relative(args.model), "out": str(args.out)}
    if args.steering:
        with tempfile.TemporaryDirectory(prefix="skipkv-overhead-") as folder:
            rows = steering_table(args, Path(folder))
        return finish(args.out, settings, rows)
    rows = []
    print(
        f"{'budget':>6}{'batch':>7}{'stock ms':>10}{'evicting ms':>13}{'ratio':>8}{'from - to':>16}{'compactions':>13}"
    )
    with tempfile.TemporaryDirectory(prefix="skipkv-overhead-") as folder:
        if args.layers is not None:
            args.model = random_model(args.model, args.layers, args.hidden_size, Path(folder))
        for budget in args.budgets:
            for batch_size in args.batch_sizes:
                row = measure(Shape(budget, batch_size), args, Path(folder))
                rows.append(row)
                spread = f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}"
                print(
                    f"{budget:6}{batch_size:7}{row['stock_ms']:10.2f}{row['evicting_ms']:13.2f}{row['ratio']:8.3f}"
                    f"{spread:>16}{row['compactions']:13}",
                    flush=True,
                )
                if row["compactions"] < batch_size * args.rounds // 2:
                    print("error: hardly any compaction took place; these are not figures of eviction", file=sys.stderr)
                    return 1
    return finish(args.out, settings, rows)


def finish(out: Path | None, settings: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Write the figures, if asked for."""
    if out:
        write_summary({"run": provenance("benchmarks.overhead", settings), "shapes": rows}, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
