"""The one engine of this process."""

from __future__ import annotations

import atexit
import functools
import gc
import shutil
import tempfile
from typing import TYPE_CHECKING, Any
from unittest import mock

from skipkv_vllm.scheduler.listeners import TraceListener
from skipkv_vllm.trace.collector import TraceCollector
from tests import gated_delta_cpu, rank_processes
from tests.harness.settings import ENGINE_ARGUMENTS, MODEL, POLICY_ARGUMENTS

if TYPE_CHECKING:
    import vllm

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
    _allow_options()
    _replace_kernels_once()
    gated_delta_cpu.use_float32()
    rank_processes.use()


def _allow_options() -> None:
    """Let tests use what vLLM switches off on CPUs.

    That is asynchronous scheduling, and for models with latents (MLA) chunked prefill and the prefix cache, although
    CPUs can compute both.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__
    options = ("async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens")

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        scheduling, cache = vllm_config.scheduler_config, vllm_config.cache_config
        asked, shares = {name: getattr(scheduling, name) for name in options}, cache.enable_prefix_caching
        original(cls, vllm_config)
        vars(scheduling).update(asked)
        cache.enable_prefix_caching = shares

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
    listeners = scheduler_of(llm).eviction.listeners
    return next(each.collector for each in listeners if isinstance(each, TraceListener))


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
