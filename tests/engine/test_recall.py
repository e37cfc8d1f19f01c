"""Evicted tokens come back: the engine equals an oracle that stores and recalls by itself."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import pytest

from tests import harness
from tests.engine import test_families as families
from tests.engine import test_speculation as speculation
from tests.harness import PAGE, Job, Outcome
from tests.reference.comparison import UNPROTECTED, another_question, check, settings_of
from tests.soak import runtime_of

if TYPE_CHECKING:
    from skipkv_vllm.trace.files import Trace
    from tests.reference.references import ReferenceCache

RECALL: dict[str, Any] = {
    "kv_request_policies": ["h2o", "snapkv", "random"],
    "kv_recall_memory": 0.05,
    "kv_recall_share": 0.3,
    "kv_recall_interval": 16,
    "kv_recall_threshold": 0.05,
}
"""The threshold is low, because the bundled model's attention is spread over short texts."""
SIZES = {"kv_budget": 160, "kv_buffer": 48}
METHODS = ["skipkv", "h2o", "snapkv", "random", "skipkv"]


def job_of(**arguments: Any) -> Job:
    """Five requests of every method, the last of which finds most of the first one's prompt in the prefix cache."""
    prompts = harness.demo_prompts(4, at_least=100)
    return Job([*prompts, another_question(prompts[0])], METHODS, 250, every=7, arguments=RECALL | SIZES | arguments)


def num_recalled(trace: Trace) -> int:
    """Return how many tokens came back, counted in each layer and head."""
    came = 0
    for i in range(1, len(trace.kept)):
        before = range(int(trace.logical_length[i - 1]))
        for held, known in zip(
            trace.kept[i].flatten(0, 1).tolist(), trace.kept[i - 1].flatten(0, 1).tolist(), strict=True
        ):
            came += sum(position in before for position in set(held) - set(known))
    return came


def run(job: Job, references: ReferenceCache, runner: str = "v1", min_compactions: int = 4) -> Outcome:
    """Run a job and compare it with the oracle."""
    outcome = harness.run(job, runner)
    counts = [num_recalled(trace) for trace in outcome.traces]
    print("came back:", counts)
    # A protected prompt may leave no room.
    limits = [settings_of(job, number) for number in range(len(job.prompts))]
    has_room = [each.num_recalled(len(prompt)) > 0 for each, prompt in zip(limits, job.prompts, strict=True)]
    assert sum(has_room) >= len(job.prompts) / 2
    assert [count > 0 for count in counts] == has_room, "the threshold is too high for this test to show anything"
    check(job, outcome, references, min_compactions=min_compactions)
    return outcome


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_engine_equals_reference(granularity: str, references: ReferenceCache) -> None:
    job = job_of(kv_granularity=granularity)
    outcome = run(job, references)
    assert outcome.num_cached[-1] >= 3 * PAGE, "the prefix cache was not hit"
    llm = harness.engine(**job.arguments)
    scheduler, runtime = harness.scheduler_of(llm), runtime_of(llm)
    told = scheduler.eviction.stats._counts
    average = sum(map(num_recalled, outcome.traces)) / len(runtime.cache.layers) / runtime.cache.layers[0].num_heads
    # Counts of the engine's start are of its warm-up, and the last report may be of the step before.
    assert told["recalled_tokens"] >= 0.9 * average
    assert 0 < told["recall_used_tokens"] <= told["recall_checked_tokens"] <= told["recalled_tokens"]
    assert told.get("dropped_stored_tokens", 0) == 0
    assert scheduler.eviction.store.num_tokens == 0


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_runner_v2_equals_reference(granularity: str, references: ReferenceCache) -> None:
    job = job_of(kv_granularity=granularity)
    job = dataclasses.replace(job, prompts=job.prompts[:3], policies=METHODS[:3], num_new=120)
    assert run(job, references, "v2", min_compactions=4).is_v2


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_prompts_that_are_not_protected(granularity: str, references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(3, at_least=150)
    arguments = {"kv_granularity": granularity} | RECALL | UNPROTECTED
    run(Job(prompts, ["skipkv", "rkv", "snapkv"], 100, every=7, arguments=arguments), references)


def test_prefill_in_chunks(references: ReferenceCache) -> None:
    """A chunk ends where tokens are exchanged, also a few tokens before the end of a compacted prompt."""
    first, second = harness.demo_prompts(2, at_least=400)
    arguments = RECALL | {"kv_protect_prompt": False, "kv_budget": 96, "kv_buffer": 32, "max_num_batched_tokens": 128}
    job = Job([first, second, another_question(first)], ["rkv", "skipkv", "rkv"], 60, every=9, arguments=arguments)
    run(job, references, min_compactions=8)


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_a_preempted_request_resumes_to_the_same_tokens(granularity: str, references: ReferenceCache) -> None:
    job = job_of(kv_granularity=granularity, kv_admission="optimistic", num_gpu_blocks_override=24)
    outcome = run(job, references)
    assert sum(outcome.num_preemptions) > 0, "the pool is too large for this test to show anything"


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_drafts(runner: str, references: ReferenceCache) -> None:
    """A step with drafts ends at an exchange, as at a compaction."""
    is_v2 = runner == "v2"
    policies = {"kv_request_policies": ["h2o", "random"]}
    job = speculation.job_of("eagle", is_async=is_v2, kv_granularity="sentence", **(RECALL | policies))
    job = speculation.shortened(job) if is_v2 else dataclasses.replace(job, num_new=200)
    outcome = run(job, references, runner, min_compactions=3)
    assert outcome.acceptance > 0.2


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_next"])
def test_models_with_other_layers(family: str) -> None:
    # These models have one or two layers of full attention, too few to give much evidence.
    options = RECALL | {"kv_request_policies": ["h2o", "random"], "kv_recall_threshold": 0.002}
    job = families.job_of(family, **options)
    outcome = harness.run(job)
    assert sum(map(num_recalled, outcome.traces)) > 0, "the threshold is too high for this test to show anything"
    check(job, outcome, families.oracle(family), min_compactions=3)


@pytest.mark.usefixtures("one_thread_a_worker")
@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize(
    "size",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "async_scheduling": False}],
    ids=["tensor", "pipeline"],
)
def test_several_workers(size: dict[str, Any], granularity: str, references: ReferenceCache) -> None:
    """All ranks have the same pages of the store, and know the sentences and weights of all."""
    job = job_of(kv_granularity=granularity, max_model_len=512, max_num_batched_tokens=512, **size)
    run(dataclasses.replace(job, num_new=200), references, min_compactions=3)


def test_equals_stock_without_eviction() -> None:
    prompts = harness.demo_prompts(4)
    expected = harness.run(Job(prompts, [], 100, every=5, num_logprobs=5))
    job = Job(prompts, ["skipkv", "full"] * 2, 100, 5, RECALL | {"kv_budget": 1024}, num_logprobs=5)
    outcome = harness.run(job)
    assert not any(len(trace.kept) for trace in outcome.traces)
    assert (outcome.tokens, outcome.logprobs) == (expected.tokens, expected.logprobs)


def test_without_room_in_the_store_it_is_plain_eviction(caplog: pytest.LogCaptureFixture) -> None:
    """One page for all requests: each drops the others' tokens, says so once, and answers."""
    job = job_of(kv_recall_memory=1e-6)
    with caplog.at_level(logging.WARNING, logger="vllm.skipkv"):
        outcome = harness.run(job)
    assert all(len(tokens) == job.num_new for tokens in outcome.tokens)
    eviction = harness.scheduler_of(harness.engine(**job.arguments)).eviction
    assert eviction.store.num_pages == 1
    assert eviction.stats._counts["dropped_stored_tokens"] > 500
    assert caplog.text.count("the host memory for evicted tokens is full") == 1
