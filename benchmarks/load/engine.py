"""An engine in a process of its own that answers a load and times every step and token."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import remote
from benchmarks.remote import answer_orders
from skipkv_vllm.evaluation.children import attended

from .drafts import DraftCounter, Drafts
from .lengths import Offered

STEP_COLUMNS = ("seconds", "requests", "tokens", "prefill_tokens", "resident_tokens", "compactions")


class Order(NamedTuple):
    """A load for an engine to answer: all requests are there at the start."""

    load: Sequence[Offered]
    ignore_eos: bool


@dataclass
class Run:
    """The figures of a run.

    Attributes:
        seconds: from the first request's arrival to the last one's end.
        output_tokens: generated.
        finished: requests.
        ttft: seconds from the start to each request's first token.
        itl: seconds between two tokens of a request, of all of them; a compaction's step is in them like any other.
        peak_running: most requests that ran at once.
        preemptions: of all requests.
        compactions: of all requests.
        steps: float64 `[steps, 6]`, see `STEP_COLUMNS`.
        admitted: numbers of the requests in the order in which they were first admitted.
        longest_overtaken: seconds past its turn at which a request was overtaken, at most; 0 without grouping.
        kv_bytes: of a token.
        num_pages: of the pool.
        drafts: of speculative decoding.
    """

    seconds: float = 0.0
    output_tokens: int = 0
    finished: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: np.ndarray = field(default_factory=lambda: np.zeros(0))
    peak_running: int = 0
    preemptions: int = 0
    compactions: int = 0
    steps: np.ndarray = field(default_factory=lambda: np.zeros((0, len(STEP_COLUMNS))))
    admitted: list[int] = field(default_factory=list)
    longest_overtaken: float = 0.0
    kv_bytes: int = 0
    num_pages: int = 0
    drafts: Drafts = field(default_factory=Drafts)


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        from benchmarks.tiny_reasoner.problems import problems
        from skipkv_vllm import LLM

        # Without policy options this is vLLM's own class.
        self.llm = LLM(**arguments)
        config = self.llm.llm_engine.vllm_config
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler, self.executor = core.scheduler, core.model_executor
        self.evicts = config.scheduler_config.scheduler_cls is not None and hasattr(self.scheduler, "block_manager")
        # Text with sentences in it, so that the tracker has what it usually has.
        text = "\n\n".join(f"{problem.question}\n\n{problem.completion}" for problem in problems("train", 400))
        self.ids = cached_tokenizer_from_config(config.model_config).encode(text)
        self.steps: list[tuple[float, ...]] = []
        self.drafts = DraftCounter(self.scheduler)
        self._watch()

    def _watch(self) -> None:
        from skipkv_vllm.integration.compat import received_orders

        schedule, scheduler, now = self.scheduler.schedule, self.scheduler, time.perf_counter
        evicted = scheduler.block_manager.num_evicted if self.evicts else None

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = now()
            output = schedule(*args, **kwargs)
            running = scheduler.running
            counts = output.num_scheduled_tokens
            resident = sum(r.num_computed_tokens for r in running)
            compactions = 0
            if evicted is not None:
                resident -= sum(evicted(r.request_id) for r in running)
                orders = received_orders(output)
                compactions = len(orders.compactions) if orders else 0
            prefill = sum(count for count in counts.values() if count > 1)
            self.steps.append((started, len(counts), output.total_num_scheduled_tokens, prefill, resident, compactions))
            return output

        scheduler.schedule = watched

    def answer(self, order: Order) -> Run:
        """Run a load to its end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, run, now = self.llm.llm_engine, Run(), time.perf_counter
        assert self.scheduler.reset_prefix_cache()
        queue = self.scheduler.waiting
        if hasattr(queue, "longest_overtaken"):
            queue.longest_overtaken = 0.0
        self.steps.clear()
        self.drafts.by_request.clear()
        numbers: dict[str, int] = {}
        last: dict[str, float] = {}
        gaps: dict[float, int] = defaultdict(int)
        admitted: dict[int, None] = {}
        offset = 0
        started = now()
        for number, each in enumerate(order.load):
            prompt = self._prompt(offset, each.num_prompt)
            offset += each.num_prompt
            params = SamplingParams(
                max_tokens=each.num_output, temperature=0, ignore_eos=order.ignore_eos, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            numbers[engine.add_request(str(number), {"prompt_token_ids": prompt}, params)] = number
        requests = list(self.scheduler.requests.values())
        while engine.has_unfinished_requests():
            outputs = engine.step()
            at = now()
            for output in outputs:
                name = output.request_id
                before = last.get(name)
                if before is None:
                    run.ttft.append(at - started)
                else:
                    gaps[at - before] += 1
                last[name] = at
                run.output_tokens += len(output.outputs[0].token_ids)
                run.finished += output.finished
            running = self.scheduler.running
            run.peak_running = max(run.peak_running, len(running))
            if len(admitted) < len(requests):
                admitted |= dict.fromkeys(numbers[r.request_id] for r in running)
        run.seconds = now() - started
        run.itl = np.repeat(list(gaps.keys()), list(gaps.values()))
        run.preemptions = sum(request.num_preemptions for request in requests)
        run.admitted = list(admitted)
        run.steps = np.array(self.steps)
        run.steps[:, 0] = np.diff(run.steps[:, 0], append=started + run.seconds)
        run.compactions = int(run.steps[:, 5].sum())
        run.drafts = self.drafts.total()
        run.longest_overtaken = getattr(queue, "longest_overtaken", 0.0)
        run.num_pages = self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        (group,) = self.scheduler.kv_cache_config.kv_cache_groups
        run.kv_bytes = len(group.layer_names) * group.kv_cache_spec.page_size_bytes // group.kv_cache_spec.block_size
        return run

    def _prompt(self, offset: int, length: int) -> list[int]:
        """Cut a piece out of the text; no two prompts begin alike."""
        return [self.ids[(offset + i) % len(self.ids)] for i in range(length)]


def work(connection: Connection, arguments: Mapping[str, Any], log: Path) -> None:
    """Body of an engine's process: answers each `Order` with a `Run`; see `benchmarks.remote`."""
    with attended(connection, log):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        answer_orders(connection, Engine(arguments).answer)


class Remote(remote.Remote):
    """An engine in another process.

    Args:
        arguments: of `skipkv_vllm.LLM`.
        log: file for what the engine prints.
    """

    def __init__(self, arguments: Mapping[str, Any], log: Path) -> None:
        super().__init__(work, (arguments,), log)

    def answer(self, order: Order) -> Run:
        """Have a load answered.

        Raises:
            RunError: the engine failed.
        """
        run = self.ask(order)
        assert isinstance(run, Run)
        return run
