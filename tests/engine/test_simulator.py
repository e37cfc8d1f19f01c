"""The simulator repeats the real scheduler: as many steps, preemptions and compactions."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from benchmarks.load.lengths import Offered
from benchmarks.simulate.events import Engine, Outcome, Setup
from benchmarks.simulate.steptime import StepTime
from skipkv_vllm.core.limits import Limits
from tests.harness import PAGE, engine, scheduler_of, stock_engine

LOAD = [Offered(40 + 9 * i, 300 + 37 * (i % 5)) for i in range(10)]
SETTINGS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "enable_prefix_caching": False,
    "max_model_len": 640,
    "async_scheduling": False,  # the simulator has no steps in flight
}
PAGES = 40


def real(llm) -> tuple[int, int, int]:
    """Return the steps, preemptions and compactions of the load."""
    scheduler, steps, compactions = scheduler_of(llm), 0, 0
    for i, each in enumerate(LOAD):
        params = SamplingParams(max_tokens=each.num_output, temperature=0, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [20 + (i + j) % 400 for j in range(each.num_prompt)]}
        llm.llm_engine.add_request(str(i), prompt, params)
    requests = list(scheduler.requests.values())
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        steps += 1
    if hasattr(scheduler, "eviction"):
        compactions = int(scheduler.eviction.stats.take(0, 0, 0)["compactions"])
    return steps, sum(request.num_preemptions for request in requests), compactions


def simulated(limits: Limits | None) -> Outcome:
    return Engine(LOAD, Setup(PAGES, PAGE, 8, 128, limits)).run(StepTime(1.0, 0.0, 0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("evicts", [False, True])
def test_steps_preemptions_and_compactions(evicts):
    settings = SETTINGS | {"num_gpu_blocks_override": PAGES + 1}
    policy = {"kv_budget": 96, "kv_buffer": 32, "kv_trace_dir": None}
    llm = engine(**settings, **policy) if evicts else stock_engine(**settings)
    outcome = simulated(Limits(96, 32, 8, 0) if evicts else None)
    assert real(llm) == (outcome.steps, outcome.preemptions, outcome.compactions)
    assert bool(outcome.preemptions) != evicts
    assert bool(outcome.compactions) == evicts
