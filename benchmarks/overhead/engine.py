"""An engine with endless requests, in a process of its own, that is timed step by step."""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import remote
from benchmarks.remote import answer_orders
from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.children import attended
from skipkv_vllm.ops import STATE

LONGEST = 4000  # tokens of a request


class Shape(NamedTuple):
    """One measurement: tokens kept a request, and requests at once."""

    budget: int
    batch_size: int


def engine_arguments(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Return vLLM's arguments for any arm."""
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
    if args.shape is not None:
        arguments["load_format"] = "dummy"
    if args.memory is not None:
        arguments["gpu_memory_utilization"] = args.memory
    return arguments | args.engine


def strict_arguments() -> dict[str, Any]:
    """Make vLLM raise where the host waits for the device, or a kernel is compiled, while requests run.

    Call it before vLLM's workers are imported. vLLM versions that lack a check go without it.
    """
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    if SYNC_CHECK in envs.environment_variables:
        os.environ[SYNC_CHECK] = "error"
    return {"jit_monitor_mode": "error"} if hasattr(EngineArgs, "jit_monitor_mode") else {}


SYNC_CHECK = "VLLM_GPU_SYNC_CHECK"


def unlike(asked: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Name the arguments that an engine did not take over: backend of attention, mode of graphs, scheduling."""
    mode = asked.get("compilation_config", {}).get("cudagraph_mode")
    wanted = {"attention": asked.get("attention_backend"), "graphs": mode, "async": asked.get("async_scheduling")}
    # vLLM replaces full graphs by a mode that has them for decoding only, if the backend cannot capture prefills.
    kinds = {"FULL": ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")}
    return [
        f"{name} is {got[name]}, not {value}"
        for name, value in wanted.items()
        if value is not None and got[name] not in kinds.get(str(value), (value,))
    ]


class Engine:
    """A vLLM engine in this process, with requests that never end by themselves."""

    def __init__(self, arm: str, shape: Shape, args: argparse.Namespace) -> None:
        import vllm
        from vllm.tokenizers import cached_tokenizer_from_config

        from skipkv_vllm import LLM

        self.evicts = arm in ("evicting", "recalling")
        arguments = engine_arguments(shape, args) | (strict_arguments() if args.strict and self.evicts else {})
        if args.steering and arm != "stock":
            vectors, default = {"bench": args.vector}, "bench" if arm == "steered" else "off"
            self.llm = LLM(args.model, **arguments, kv_steering_vectors=vectors, kv_steering_default=default)
        elif self.evicts:
            policy = {"kv_policy": args.policy, "kv_budget": shape.budget, "kv_buffer": args.buffer}
            if arm == "recalling":
                policy["kv_recall_memory"] = args.recall
            self.llm = LLM(args.model, **arguments, **policy)
        else:
            self.llm = vllm.LLM(args.model, **arguments)
        if args.strict and (wrong := unlike(args.engine, self.describe())):
            raise RunError(f"the engine does not run as requested: {'; '.join(wrong)}")
        self.shape, self.buffer = shape, args.buffer
        config = self.llm.llm_engine.vllm_config.model_config
        # Running text with sentences in it, so that the tracker has its usual work.
        text = "Wait, is that right?\n\nRead c = 3 + 1, so c: 4.\n\nSo b holds.\n\n" * 200
        tokenizer = cached_tokenizer_from_config(config)
        self.ids = tokenizer.encode(text)
        # Only thoughts are steered.
        self.opening = tokenizer.encode("<think>") if args.steering else []
        self.number = 0

    def describe(self) -> dict[str, Any]:
        """Return how the engine runs: attention, graphs, runner, scheduling."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        config = self.llm.llm_engine.vllm_config
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        layers = config.compilation_config.static_forward_context.values()
        backends = {each.attn_backend.get_name() for each in layers if hasattr(each, "attn_backend")}
        return {
            "attention": ", ".join(sorted(backends)),
            "graphs": config.compilation_config.cudagraph_mode.name,
            "runner": "v2" if scheduler.use_v2_model_runner else "v1",
            "async": isinstance(scheduler, AsyncScheduler),
            "sync_check": os.environ.get(SYNC_CHECK, ""),
            "jit_monitor": getattr(config.observability_config, "jit_monitor_mode", ""),
        }

    def take(self, batch_size: int) -> None:
        """Measure another number of requests from now on; at most that of the start."""
        self._stop()
        self.shape = self.shape._replace(batch_size=batch_size)

    def _stop(self) -> None:
        engine = self.llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        engine.abort_request(list(scheduler.requests), internal=True)
        while engine.has_unfinished_requests():
            engine.step()

    def start(self) -> int:
        """(Re)start all requests and bring them to the point where measuring begins.

        Returns:
            Compactions so far.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            if self.evicts and self._room():
                return self._compactions()
            self._stop()
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

    def recalled(self) -> float:
        """Count the tokens that came back, a mean of layers and heads."""
        counts = self._runtime().recalled if self.evicts else None
        return 0.0 if counts is None else float(counts.recalled)

    def steered(self) -> int:
        """Count the steered tokens of the running requests."""
        steering = self._runtime().steering
        return int(steering.state[:, STATE.index("steered")].sum()) if steering._requests else 0

    def steps(self, count: int) -> float:
        """Run steps; returns seconds."""
        engine = self.llm.llm_engine
        started = time.perf_counter()
        for _ in range(count):
            engine.step()
        return time.perf_counter() - started


def work(connection: Connection, arm: str, shape: Shape, args: argparse.Namespace, log: Path) -> None:
    """Body of an engine's process: an order is the name of a method of `Engine` and its arguments."""
    with attended(connection, log):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        engine = Engine(arm, shape, args)
        answer_orders(connection, lambda order: getattr(engine, order[0])(*order[1:]))


class Remote(remote.Remote):
    """An engine in another process.

    Args:
        arm: "stock", "evicting", "recalling", "steered" or "idle".
        shape: of the measurement.
        args: the command line.
        folder: for the engine's log.
    """

    def __init__(self, arm: str, shape: Shape, args: argparse.Namespace, folder: Path) -> None:
        log = folder / f"{arm}-{shape.budget}-{shape.batch_size}.log"
        super().__init__(work, (arm, shape, args), log)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine.

        Raises:
            RunError: the engine failed.
        """
        return self.ask((method, *arguments))
