"""Jobs: requests with their arguments, on either model runner, in this process or in a child."""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.load.drafts import DraftCounter
from skipkv_vllm.scheduler.stats import SKIPPED
from skipkv_vllm.trace.files import Trace, trace_path
from tests.harness import children
from tests.harness.process import (
    assert_pool_empty,
    collector_of,
    engine,
    scheduler_of,
    stock_engine,
    trace_folder,
    wake,
)
from tests.harness.requests import Load, Sample, generate_staggered

if TYPE_CHECKING:
    import vllm
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Job:
    """Requests for a fresh or shared engine.

    Attributes:
        prompts: token ids.
        policies: `kv_policy` of each request; empty for a stock engine.
        num_new: tokens to generate for each.
        every: steps between two arrivals.
        arguments: engine arguments that differ from the defaults.
        abort_at: number of a request -> step before which it is aborted.
        num_logprobs: log probabilities to report per token, None for none.
        budgets: `kv_budget` of each request, None for the server's; empty for all the server's.
        options: further options of each request; empty for none.
        adapters: number of a request -> LoRA adapter that it is computed with.
        sleep_level: level at which the engine sleeps before the first request; None for not at all.
    """

    prompts: list[list[int]]
    policies: list[str]
    num_new: int
    every: int
    arguments: dict[str, Any] = field(default_factory=dict)
    abort_at: dict[int, int] = field(default_factory=dict)
    num_logprobs: int | None = None
    budgets: list[int | None] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[int, LoRARequest] = field(default_factory=dict)
    sleep_level: int | None = None

    def extra_args(self, number: int) -> dict[str, Any] | None:
        """Return the options that a request sets."""
        if not self.policies:
            return None
        budget = self.budgets[number] if self.budgets else None
        further = self.options[number] if self.options else {}
        return {"kv_policy": self.policies[number]} | ({} if budget is None else {"kv_budget": budget}) | further


@dataclass
class Outcome:
    """Result of a job; lists are in the order of the prompts.

    Attributes:
        tokens: generated token ids.
        logprobs: per token, token id -> log probability.
        num_cached: prompt tokens found in the prefix cache.
        traces: empty for a stock engine.
        reports: eviction report of each response; None for a request that keeps everything.
        samples, load, num_preemptions: see `Generation`.
        skipped: how often the policy could not act as configured, by reason.
        num_postponed: steps that requests waited for their compaction.
        is_v2: whether Model Runner V2 ran.
        is_async: whether scheduling was asynchronous.
        attention: class of the attention implementation.
        graphs: name of vLLM's CUDA graph mode.
        cache: dtype of the KV pages.
        acceptance: share of the drafts that were accepted; 0 without speculative decoding.
    """

    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    num_cached: list[int]
    traces: list[Trace]
    reports: list[dict[str, Any] | None]
    samples: list[Sample]
    load: list[Load]
    num_preemptions: list[int]
    skipped: dict[str, int]
    num_postponed: int
    is_v2: bool
    is_async: bool
    attention: str = ""
    graphs: str = ""
    cache: str = ""
    acceptance: float = 0.0


def run(job: Job, runner: str = "v1") -> Outcome:
    """Run a job on Model Runner "v1" in this process, or "v2" in a child process; the pool is empty afterwards."""
    return run_all([job], runner)[0]


def run_all(jobs: Sequence[Job], runner: str) -> list[Outcome]:
    """Run jobs one after the other, see `run`; those of "v2" share a child process."""
    if runner == "v1":
        return [_run_here(job) for job in jobs]
    return run_in_child(jobs, interpreted=True)


def run_in_child(
    jobs: Sequence[Job],
    environment: Mapping[str, str] | None = None,
    interpreted: bool = False,
    triton_attention: bool = False,
) -> list[Outcome]:
    """Run jobs one after the other in a child process.

    Args:
        jobs: the jobs.
        environment: variables to change.
        interpreted: run Model Runner V2 in Triton's interpreter, on a CPU.
        triton_attention: use the GPU's Triton attention and page layout there as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job")
        path.write_bytes(pickle.dumps(jobs))
        children.run_file(path, dict(environment or {}), interpreted, triton_attention)
        return pickle.loads(path.with_suffix(".outcome").read_bytes())


def work(answer: int, interpreted: bool, triton_attention: bool) -> None:
    """Run job files as a child, see `children`, and write the outcomes of each next to it."""
    if interpreted:
        from tests import triton_cpu

        triton_cpu.enable()
        if triton_attention:
            triton_cpu.use_triton_attention()

    def run_file(path: Path) -> None:
        outcomes = [_run_here(job) for job in pickle.loads(path.read_bytes())]
        path.with_suffix(".outcome").write_bytes(pickle.dumps(outcomes))

    children.serve(answer, run_file)


def _run_here(job: Job) -> Outcome:
    return run_on(engine(**job.arguments) if job.policies else stock_engine(**job.arguments), job)


def run_on(llm: vllm.LLM, job: Job) -> Outcome:
    """Run a job on an engine of this process; the pool is empty afterwards."""
    import torch
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=job.num_new,
            temperature=0.0,
            ignore_eos=True,
            logprobs=job.num_logprobs,
            extra_args=job.extra_args(i),
        )
        for i in range(len(job.prompts))
    ]
    if job.sleep_level is not None:
        llm.sleep(job.sleep_level)
        wake(llm, job.sleep_level)
    before = _counts(llm)
    config = llm.llm_engine.vllm_config
    # vLLM compiles a helper for log probabilities even if the model runs eagerly, which takes a minute.
    stance = torch.compiler.set_stance("force_eager" if config.model_config.enforce_eager else "default")
    scheduler = scheduler_of(llm)
    # The counter replaces this function; other jobs of the engine have counters of their own.
    with stance, mock.patch.object(scheduler, "make_spec_decoding_stats", scheduler.make_spec_decoding_stats):
        drafts = DraftCounter(scheduler)
        done = generate_staggered(llm, job.prompts, params, job.every, job.abort_at, job.adapters)
    assert_pool_empty(llm)
    tokens: list[list[int]] = []
    logprobs: list[list[dict[int, float]]] = []
    num_cached: list[int] = []
    for output in done.outputs:
        completion = output.outputs[0] if output is not None else None
        tokens.append(list(completion.token_ids) if completion else [])
        per_token = completion.logprobs if completion and completion.logprobs else []
        logprobs.append([{token: entry.logprob for token, entry in one.items()} for one in per_token])
        num_cached.append(output.num_cached_tokens or 0 if output is not None else 0)
    traces = []
    if job.policies:
        assert collector_of(llm).flush()
        traces = [Trace.load(trace_path(trace_folder(), name)) for name in done.request_ids]
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    # If the model runs in other processes, this one has no layers.
    layers = [each for each in config.compilation_config.static_forward_context.values() if hasattr(each, "impl")]
    counts = _counts(llm) - before
    skipped = {name.removeprefix(SKIPPED): n for name, n in counts.items() if name.startswith(SKIPPED)}
    return Outcome(
        tokens,
        logprobs,
        num_cached,
        traces,
        [(output.kv_transfer_params or {}).get("skipkv") if output is not None else None for output in done.outputs],
        done.samples,
        done.load,
        done.num_preemptions,
        skipped,
        counts["postponed_compactions"],
        scheduler.use_v2_model_runner,
        isinstance(scheduler, AsyncScheduler),
        type(layers[0].impl).__mro__[1 if job.policies else 0].__name__ if layers else "",
        config.compilation_config.cudagraph_mode.name,
        str(layers[0].kv_cache.dtype) if layers else "",
        drafts.total().share or 0.0,
    )


def _counts(llm: vllm.LLM) -> Counter[str]:
    """Return the policy's counters since the engine started; nothing else takes them from these engines."""
    eviction = getattr(scheduler_of(llm), "eviction", None)
    return Counter({} if eviction is None else eviction.stats._counts)
