"""Sleep mode: after waking up, an engine answers as before, and no request continues with lost KV.

The engine runs on a CPU; `tests/sleeping.py` stands in for the memory of a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.v1.core.sched.interface import PauseState

from skipkv_vllm import bundled_gates
from tests import harness
from tests.engine.test_steering import arguments
from tests.harness import Job, Outcome
from tests.sleeping import Pools, sleep_mode

if TYPE_CHECKING:
    from vllm import LLM

# Every part of the runtime has state that could be lost.
ARGUMENTS = arguments(
    kv_policy="trimkv",
    kv_policy_config={"gates": bundled_gates()},
    kv_request_policies=["skipkv", "rkv", "h2o", "thinkv"],
    kv_steering_default="off",
    kv_budget=96,
    kv_buffer=32,
    max_num_seqs=4,
    kv_check_integrity=False,
)


def job() -> Job:
    """More requests than can run at once. The first two differ by their sentences only; the last one is steered."""
    first, *others = harness.demo_prompts(3)
    policies = ["skipkv", "rkv", "trimkv", "h2o", "thinkv", "skipkv"]
    options: list[dict[str, Any]] = [{}] * 5 + [{"steering": "b"}]
    return Job([first, first, *others, *others], policies, 120, 1, ARGUMENTS, options=options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with sleep_mode():
        harness.shutdown()
        yield harness.engine(**ARGUMENTS)
        harness.shutdown()


@pytest.fixture(scope="module")
def before(llm: LLM) -> Outcome:
    """Outcome of the engine before its first sleep."""
    outcome = harness.run_on(llm, job())
    skipkv, rkv = (outcome.traces[i].kept for i in (0, 1))
    assert not all(map(torch.equal, skipkv, rkv)), "the test would not notice lost sentences"
    return outcome


def worker_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_answers_after_level_2_are_those_from_before(llm: LLM, before: Outcome) -> None:
    outcome = harness.run_on(llm, replace(job(), sleep_level=2))

    assert outcome.tokens == before.tokens
    for trace, other in zip(outcome.traces, before.traces, strict=True):
        assert len(trace.kept) == len(other.kept) > 0
        assert all(map(torch.equal, trace.kept, other.kept))


# ---- the runtime's memory


def tensors_of(roots: Iterable[Any]) -> Iterator[Tensor]:
    """Return every tensor that is reachable without passing through a module of the model or a global name."""
    stack, seen = list(roots), set()
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | nn.Module):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        else:
            stack += each.__closure__ or () if isinstance(each, FunctionType) else gc.get_referents(each)


def held_by(worker: Any) -> list[Tensor]:
    """Return all tensors of the runtime and of its hooks in the model."""
    runner = worker.model_runner
    hooks = [module._forward_pre_hooks for module in runner.model.modules()]
    layers = [vars(layer.impl) for layer in runner.compilation_config.static_forward_context.values()]
    return list(tensors_of([runner.runtime, *hooks, *layers]))


def discarded(tensors: Iterable[Tensor], pools: Pools, pages: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that level 2 would lose. The pages are excluded: they are meant to be lost."""
    lost = {page.untyped_storage().data_ptr() for page in pages}
    return [
        tensor
        for tensor in tensors
        if pools.tag_of(tensor) in ("weights", "kv_cache") and tensor.untyped_storage().data_ptr() not in lost
    ]


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("tags", [[["weights"], ["kv_cache"]], [["kv_cache"], ["weights"]], [None]])
def test_all_state_survives_whatever_is_woken_first(tags: list[list[str] | None], llm: LLM) -> None:
    worker = worker_of(llm)
    runtime, held = worker.model_runner.runtime, held_by(worker)
    pages = runtime._compactor.cache.pages.caches
    signals = runtime.signals
    assert None not in (signals.queries, signals.sentences.tracker, signals.gates, runtime.steering)
    assert discarded(held, worker.pools, pages) == []
    with worker.pools.allocate("weights"):
        runtime.forgotten = torch.zeros(3)
    assert [t is runtime.forgotten for t in discarded(held_by(worker), worker.pools, pages)] == [True]
    del runtime.forgotten

    kept = [tensor for tensor in held if worker.pools.tag_of(tensor) != "kv_cache"]
    copies = [tensor.clone() for tensor in kept]
    llm.sleep(2)
    for each in tags:
        llm.wake_up(each)
    llm.collective_rpc("reload_weights")

    assert sum(copy.count_nonzero() > 0 for copy in copies) > 20, "nothing could have been lost"
    assert all(map(torch.equal, kept, copies))
    assert all((page == page[0, 0, 0, 0]).all() for page in pages), "the pages were not discarded"


# ---- requests in flight when the engine falls asleep


def step(llm: LLM, outputs: dict[str, Any]) -> None:
    outputs |= {output.request_id: output for output in llm.llm_engine.step()}


def add(llm: LLM, one: Job, number: int) -> str:
    params = SamplingParams(max_tokens=one.num_new, temperature=0, ignore_eos=True, extra_args=one.extra_args(number))
    return llm.llm_engine.add_request(str(number), {"prompt_token_ids": one.prompts[number]}, params)


def sleep(llm: LLM, level: int, mode: str, outputs: dict[str, Any]) -> None:
    """Sleep in a mode of vLLM's; "wait" is done as by an engine core in a process of its own, which alone has it."""
    core = llm.llm_engine.engine_core.engine_core
    if mode == "wait":
        core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        while core.scheduler.running:
            step(llm, outputs)
        core._finish_pause(clear_cache=True)
        core.model_executor.sleep(level)
    else:
        llm.sleep(level, mode)
    if level == 0:
        while core.batch_queue:  # an engine core in a process of its own waits for them
            step(llm, outputs)
        llm.release_kv_cache_memory()


def num_compactions(scheduler: Any, request_id: str) -> int:
    return scheduler.eviction.requests[request_id].planner.num_compactions


def check_requests(llm: LLM, before: Outcome, sleeps: list[tuple[int, str]]) -> None:
    """Let the engine sleep while requests run that have been compacted, and others wait; one more comes meanwhile."""
    one, scheduler, outputs = job(), harness.scheduler_of(llm), {}
    pool, last = scheduler.kv_cache_manager.block_pool, len(one.prompts) - 1
    names = [add(llm, one, number) for number in range(last)]
    for number, (level, mode) in enumerate(sleeps):
        for _ in range(12 if number else 85):
            step(llm, outputs)
        assert len(scheduler.running) == 4
        assert any(num_compactions(scheduler, request.request_id) for request in scheduler.running)

        sleep(llm, level, mode, outputs)

        assert not scheduler.running
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert len(pool.cached_block_hash_to_block) == 0
        assert not any(num_compactions(scheduler, name) for name in names if name in scheduler.requests)
        if number == 0:
            add(llm, one, last)
        if mode == "abort":
            llm.llm_engine.abort_request(names, internal=True)  # what an engine core in a process of its own reports
        harness.wake(llm, level)
    while llm.llm_engine.has_unfinished_requests():
        step(llm, outputs)
        scheduler.check_integrity()

    harness.assert_pool_empty(llm)
    for number in range(last if mode == "abort" else 0, last + 1):
        tokens = list(outputs[str(number)].outputs[0].token_ids)
        assert tokens == before.tokens[number], f"request {number} ({one.policies[number]})"


@pytest.mark.parametrize(
    "sleeps",
    [[(1, "keep"), (2, "keep"), (0, "keep")], [(2, "wait")], [(2, "abort")]],
    ids=["kept", "awaited", "aborted"],
)
def test_requests_lose_their_kv_and_nothing_else(sleeps: list[tuple[int, str]], llm: LLM, before: Outcome) -> None:
    check_requests(llm, before, sleeps)
