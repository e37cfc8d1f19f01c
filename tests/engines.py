"""Engines for tests: one at a time in this process, or in a child process for Model Runner V2.

Starting an engine takes seconds, so tests ask `engine(...)` for one and get the running one if it has the
same settings. Model Runner V2 needs Triton's interpreter for the whole process, which would change what
Runner V1 runs, so `run` gives V2 a process of its own. The environment is set in `conftest.py`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from skipkv_vllm import bundled_model
from skipkv_vllm.scheduler.listeners import TraceListener
from skipkv_vllm.trace.collector import TraceCollector
from skipkv_vllm.trace.files import Trace, trace_path
from tests import rank_processes

if TYPE_CHECKING:
    import vllm
    from transformers import PreTrainedTokenizerBase
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

REPOSITORY = Path(__file__).parents[1]
MODEL = os.environ.get("SKIPKV_TEST_MODEL") or bundled_model()
RUNNERS = {"v1-eager": ("v1", True), "v1-compiled": ("v1", False), "v2": ("v2", True)}
"""Model runner, and whether the model runs eagerly instead of compiled."""
PAGE = 32

ENGINE_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 128,
    "block_size": PAGE,
    # Few blocks, because the integrity check visits each of them after each step.
    "num_gpu_blocks_override": 256,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "async_scheduling": False,
    "disable_log_stats": True,
}
PUBLISHED = ("tova", "knorm", "keydiff", "manifoldkv", "obcache", "caote", "vatp", "longflow")
POLICY_ARGUMENTS: dict[str, Any] = {
    "kv_policy": "skipkv",
    "kv_budget": 224,
    "kv_buffer": 64,
    "kv_policy_config": {},
    "kv_request_policies": ["h2o", "snapkv", "random", "thinkv", *PUBLISHED],
    "kv_check_integrity": True,
}


# ---- prompts


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def chat_prompt(question: str) -> list[int]:
    """Return the token ids of a user's question, up to the answer."""
    messages = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def demo_prompts(count: int, at_least: int = 0) -> list[list[int]]:
    """Return prompts that share less than a block: one question each, or as many as make `at_least` tokens."""
    from benchmarks.tiny_reasoner.problems import problems

    questions = iter([problem.question for problem in problems("demo", 32 * count)])
    prompts = []
    for _ in range(count):
        text = next(questions)
        while len(chat_prompt(text)) < at_least:
            text += "\n" + next(questions)
        prompts.append(chat_prompt(text))
    return prompts


# ---- the one engine of this process

_current: tuple[tuple, vllm.LLM] | None = None


@functools.cache
def trace_folder() -> str:
    """Return the folder for the traces of this process's engines; it is removed at exit."""
    folder = tempfile.mkdtemp(prefix="skipkv-traces-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def engine(*, reset: bool = True, **arguments: Any) -> vllm.LLM:
    """Return an engine with eviction; `arguments` override `ENGINE_ARGUMENTS` and `POLICY_ARGUMENTS`.

    With `reset=False` it keeps its prefix cache.
    """
    from skipkv_vllm import LLM

    return _engine(LLM, {"kv_trace_dir": trace_folder()} | POLICY_ARGUMENTS | arguments, reset)


def stock_engine(**arguments: Any) -> vllm.LLM:
    """Return an engine of stock vLLM; `arguments` override `ENGINE_ARGUMENTS`."""
    from vllm import LLM

    return _engine(LLM, arguments)


def _engine(cls: type, arguments: dict[str, Any], reset: bool = True) -> vllm.LLM:
    global _current
    _prepare()
    arguments = {"model": MODEL} | ENGINE_ARGUMENTS | arguments
    key = (cls, repr(sorted(arguments.items())))
    if _current is None or _current[0] != key:
        shutdown()
        gc.freeze()  # a start collects garbage many times; until the engine stops, it looks at new objects only
        _current = (key, cls(**arguments))
    llm = _current[1]
    # A failed test must not leave requests or cached prompts to the next one.
    _abort_all(llm)
    assert not reset or llm.reset_prefix_cache()
    return llm


@functools.cache
def _prepare() -> None:
    """Change what vLLM does in this process: let tests switch more, and let engines start faster."""
    _allow_async_scheduling()
    _replace_kernels_once()
    rank_processes.use()


def _allow_async_scheduling() -> None:
    """Let tests use asynchronous scheduling, which vLLM switches off on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _replace_kernels_once() -> None:
    """Let only the first engine of this process search all modules for the Triton kernels that CPUs replace."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = staticmethod(
        functools.cache(CpuPlatform.register_triton_kernel_overrides)
    )


def shutdown() -> None:
    """Stop the engine of this process, if there is one."""
    global _current
    if _current is not None:
        (_, llm), _current = _current, None
        with mock.patch.object(gc, "collect"):  # once is enough, below
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: vllm.LLM) -> Any:
    """Return the scheduler of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def collector_of(llm: vllm.LLM) -> TraceCollector:
    """Return what collects the traces of an engine that runs in this process."""
    listeners = scheduler_of(llm).eviction._listeners
    return next(each._collector for each in listeners if isinstance(each, TraceListener))


def _abort_all(llm: vllm.LLM) -> None:
    if llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.abort_request(list(scheduler_of(llm).requests), internal=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def wake(llm: vllm.LLM, level: int) -> None:
    """Wake an engine that sleeps at a level, weights first, and reload weights that level 2 discarded.

    At level 0 only the KV cache was released.
    """
    if level:
        llm.wake_up(["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    assert llm.wake_up(["kv_cache"])


def assert_pool_empty(llm: vllm.LLM) -> None:
    """Check that all blocks but the null block are free."""
    scheduler = scheduler_of(llm)
    assert not scheduler.running
    assert not scheduler.waiting
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


# ---- running requests


class Sample(NamedTuple):
    """One running request after one step, as the scheduler sees it.

    Attributes:
        step: number of the step.
        request: number of the request.
        num_logical: tokens computed.
        num_evicted: computed tokens that were evicted.
        num_pages: blocks held.
    """

    step: int
    request: int
    num_logical: int
    num_evicted: int
    num_pages: int

    @property
    def num_resident(self) -> int:
        """Tokens held."""
        return self.num_logical - self.num_evicted


class Load(NamedTuple):
    """The engine in one step.

    Attributes:
        num_running: requests that ran, including those that finished in the step.
        num_waiting: requests that wait after it.
        num_pages: blocks in use after it.
    """

    num_running: int
    num_waiting: int
    num_pages: int


@dataclass
class Generation:
    """Record of `generate_staggered`; lists are in the order of the prompts.

    Attributes:
        outputs: final output of each request, the last one of an aborted request; None if there was none.
        request_ids: vLLM's internal ids, which also name the traces.
        samples: a sample per running request and step, of engines with eviction.
        load: per step.
        num_preemptions: of each request.
    """

    outputs: list[RequestOutput | None]
    request_ids: list[str]
    samples: list[Sample] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    num_preemptions: list[int] = field(default_factory=list)


def generate_staggered(
    llm: vllm.LLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    every: int,
    abort_at: Mapping[int, int] | None = None,
    adapters: Mapping[int, LoRARequest] | None = None,
) -> Generation:
    """Run requests that arrive one after the other, and sample the scheduler after every step.

    Args:
        llm: an engine in this process.
        prompts: token ids.
        params: sampling parameters of each.
        every: steps between two arrivals.
        abort_at: number of a request -> step before which it is aborted.
        adapters: number of a request -> its LoRA adapter.
    """
    llm_engine = llm.llm_engine
    abort_at, adapters = abort_at or {}, adapters or {}
    done = Generation([None] * len(prompts), [], num_preemptions=[0] * len(prompts))
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    step = 0
    while len(done.request_ids) < len(prompts) or llm_engine.has_unfinished_requests():
        number = len(done.request_ids)
        if number < len(prompts) and step == number * every:
            prompt = {"prompt_token_ids": list(prompts[number])}
            adapter = adapters.get(number)
            done.request_ids.append(llm_engine.add_request(str(number), prompt, params[number], lora_request=adapter))
        if due := [done.request_ids[i] for i, at in abort_at.items() if at == step]:
            llm_engine.abort_request(due, internal=True)
        # An asynchronous engine may finish a request some steps after its last token.
        num_finished = 0
        for output in llm_engine.step():
            done.outputs[int(output.request_id)] = output
            num_finished += output.finished
        num_pages = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        done.load.append(Load(len(scheduler.running) + num_finished, len(scheduler.waiting), num_pages))
        for request in scheduler.requests.values():
            done.num_preemptions[done.request_ids.index(request.request_id)] = request.num_preemptions
        done.samples += _look_at_scheduler(llm, step, done.request_ids)
        step += 1
    return done


def _look_at_scheduler(llm: vllm.LLM, step: int, request_ids: list[str]) -> list[Sample]:
    scheduler = scheduler_of(llm)
    if not hasattr(scheduler, "block_manager"):
        return []
    scheduler.check_integrity()
    pages = scheduler.block_manager
    return [
        Sample(
            step,
            request_ids.index(request.request_id),
            request.num_computed_tokens,
            pages.num_evicted(request.request_id),
            pages.num_blocks(request.request_id),
        )
        for request in scheduler.running
    ]


# ---- the same on either model runner


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
        is_v2: whether Model Runner V2 ran.
        is_async: whether scheduling was asynchronous.
        attention: class of the attention implementation.
        graphs: name of vLLM's CUDA graph mode.
        cache: dtype of the KV pages.
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
    is_v2: bool
    is_async: bool
    attention: str = ""
    graphs: str = ""
    cache: str = ""


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
        code = f"from tests import engines; engines.run_as_child({str(path)!r}, {interpreted}, {triton_attention})"
        variables = os.environ | dict(environment or {})
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, env=variables)
        return pickle.loads(path.with_suffix(".outcome").read_bytes())


def run_as_child(path: str, interpreted: bool, triton_attention: bool) -> None:
    """Run the jobs in a file, see `run_in_child`, and write the outcomes next to it."""
    if interpreted:
        from tests import triton_cpu

        triton_cpu.enable()
        if triton_attention:
            triton_cpu.use_triton_attention()
    outcomes = [_run_here(job) for job in pickle.loads(Path(path).read_bytes())]
    Path(path).with_suffix(".outcome").write_bytes(pickle.dumps(outcomes))
    shutdown()


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
    skipped_before = _skipped(llm)
    config = llm.llm_engine.vllm_config
    # vLLM compiles a helper for log probabilities even if the model runs eagerly, which takes a minute.
    with torch.compiler.set_stance("force_eager" if config.model_config.enforce_eager else "default"):
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
    skipped = _skipped(llm) - skipped_before
    scheduler = scheduler_of(llm)
    return Outcome(
        tokens,
        logprobs,
        num_cached,
        traces,
        [(output.kv_transfer_params or {}).get("skipkv") if output is not None else None for output in done.outputs],
        done.samples,
        done.load,
        done.num_preemptions,
        dict(skipped),
        scheduler.use_v2_model_runner,
        isinstance(scheduler, AsyncScheduler),
        type(layers[0].impl).__mro__[1 if job.policies else 0].__name__ if layers else "",
        config.compilation_config.cudagraph_mode.name,
        str(layers[0].kv_cache.dtype) if layers else "",
    )


def _skipped(llm: vllm.LLM) -> Counter[str]:
    """Return the policy's skip counters since the engine started; nothing else takes them from these engines."""
    eviction = getattr(scheduler_of(llm), "eviction", None)
    counts = {} if eviction is None else eviction.stats._counts
    return Counter({name.removeprefix("skipped:"): n for name, n in counts.items() if name.startswith("skipped:")})
