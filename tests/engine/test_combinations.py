"""Prefix caching, chunked prefill, asynchronous scheduling and both model runners in all combinations.

Each run has a prompt of several chunks that is compacted while it is computed, blocks that two requests share and one
rewrites, and a pool so small that requests are preempted. Each answer equals the oracle's.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests import harness
from tests.harness import PAGE, Job
from tests.reference.comparison import UNPROTECTED, another_question, check

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

CHUNKED = {True: {"max_num_batched_tokens": 64}, False: {"enable_chunked_prefill": False}}
COMBINATIONS = list(itertools.product([True, False], [True, False]))
"""prefix caching, chunked prefill"""


def job(has_prefix_cache: bool, is_chunked: bool, is_async: bool) -> Job:
    """The same requests for every combination."""
    (long,) = harness.demo_prompts(1, at_least=100)
    short = harness.demo_prompts(3)
    arguments = UNPROTECTED | {
        "kv_admission": "optimistic",
        "num_gpu_blocks_override": 12,
        # Without chunked prefill, vLLM requires steps as long as the longest sequence.
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": has_prefix_cache,
        "async_scheduling": is_async,
    }
    return Job(
        [short[0], long, another_question(long), *short[1:]],
        ["full", "rkv", "streaming_llm", "skipkv", "h2o"],
        100,
        # The third request arrives while the second one still holds its whole prompt.
        every=3,
        arguments=arguments | CHUNKED[is_chunked],
        budgets=[None, 160, None, None, None],
    )


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_every_combination_equals_the_reference(runner: str, is_async: bool, references: ReferenceCache) -> None:
    jobs = [job(*combination, is_async) for combination in COMBINATIONS]

    outcomes = harness.run_all(jobs, runner)

    for (has_prefix_cache, is_chunked), one, outcome in zip(COMBINATIONS, jobs, outcomes, strict=True):
        print(f"prefix caching {has_prefix_cache}, chunked prefill {is_chunked}:")
        assert (outcome.is_v2, outcome.is_async) == (runner == "v2", is_async)
        assert outcome.num_cached[2] == (3 * PAGE if has_prefix_cache else 0)
        assert sum(outcome.num_preemptions) > 0
        check(one, outcome, references, min_compactions=1)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_request_that_waits_for_its_compaction_keeps_the_same_tokens(
    runner: str, is_async: bool, references: ReferenceCache
) -> None:
    """Five requests that come due in the same step, of which two are compacted."""
    # Each arrives a step after the one before it.
    prompts = [prompt[: 100 + i] for i, prompt in enumerate(harness.demo_prompts(5, at_least=105))]
    arguments = {"kv_buffer": 6, "kv_compactions_per_step": 1, "async_scheduling": is_async, "kv_budget": 120}
    policies = ["skipkv", "h2o", "rkv", "snapkv", "random"]
    # None is compacted in its last step, after which no sample would show it.
    one = Job(prompts, policies, 59, every=1, arguments=arguments | {"max_num_batched_tokens": 640})

    outcome = harness.run(one, runner)

    assert (outcome.is_v2, outcome.is_async) == (runner == "v2", is_async)
    assert outcome.num_postponed >= 4
    assert outcome.num_preemptions == [0] * 5
    check(one, outcome, references, min_compactions=5)


def test_a_compaction_that_finds_no_page_for_a_shared_one_preempts(
    references: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request must not wait for a block: it would grow meanwhile, and other tokens would be evicted."""
    (long,) = harness.demo_prompts(1, at_least=150)
    prompts, budgets = [*harness.demo_prompts(1), long, another_question(long)], [None, 160, 160]
    arguments = job(True, True, False).arguments
    shared = Job(prompts, ["full", "rkv", "streaming_llm"], 60, every=3, arguments=arguments, budgets=budgets)
    llm = harness.engine(**arguments)
    manager, refused = harness.scheduler_of(llm).block_manager, []
    compact = manager.compact
    monkeypatch.setattr(manager, "compact", lambda name, plan: compact(name, plan) or refused.append(name))

    outcome = harness.run_on(llm, shared)

    assert outcome.num_cached[2] >= 4 * PAGE
    assert refused
    # Only the newest request is preempted, possibly again while the pool is full.
    assert outcome.num_preemptions[:2] == [0, 0]
    assert outcome.num_preemptions[2] > 0
    check(shared, outcome, references, min_compactions=1)
