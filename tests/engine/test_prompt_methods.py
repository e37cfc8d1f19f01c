"""Methods that compact the prompt: scored by its question, or by draft tokens that are discarded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests import harness
from tests.harness import PAGE, Job
from tests.reference.comparison import UNPROTECTED, another_question, check, settings_of
from tests.soak import runtime_of

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

ARGUMENTS: dict[str, Any] = UNPROTECTED | {
    "kv_policy": "laq",
    "kv_policy_config": {},
    "kv_request_policies": ["finch", "snapkv"],
}


def counted(llm: Any, name: str) -> float:
    """Return the scheduler's counters since the engine started."""
    return harness.scheduler_of(llm).eviction.stats._counts.get(name, 0)


def make_job(**arguments: Any) -> Job:
    """Prompts longer and shorter than the bound and the budget, two prompts that share blocks, and mixed methods."""
    first, *longer = harness.demo_prompts(5, at_least=150)
    (middle,), (short,) = harness.demo_prompts(1, at_least=90), harness.demo_prompts(1)
    # The second request arrives while the first one is computed and shares its blocks; both prompts end in one step.
    prompts = [first, another_question(first), middle, longer[0], short, *longer[1:], first]
    methods = ["laq", "laq", "laq", "finch", "laq", "finch", "snapkv", "laq", "finch"]
    budgets: list[int | None] = [160, 160, len(middle) - 12, *(None for _ in prompts[3:])]
    options: list[dict[str, Any]] = [{} for _ in prompts]
    options[5]["kv_task_tokens"] = 3
    return Job(prompts, methods, 120, every=1, arguments=ARGUMENTS | arguments, budgets=budgets, options=options)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kv_defer_prompt": True, "async_scheduling": True, "kv_policy_config": {"with_window": True, "lookahead": 5}},
        # Requests have to wait for blocks.
        {"num_gpu_blocks_override": 25, "async_scheduling": True, "enable_prefix_caching": False},
        {"enforce_eager": False, "kv_granularity": "sentence"},
        {
            "kv_policy": "finch",
            "kv_policy_config": {"ask_chunks": True},
            "kv_request_policies": ["laq", "snapkv"],
            "async_scheduling": True,
        },
    ],
    ids=["chunks", "whole", "tight", "compiled", "asked"],
)
def test_methods_about_the_prompt_equal_the_reference(
    arguments: dict[str, Any], references: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(**arguments)
    llm = harness.engine(**job.arguments)
    decoder, batches = runtime_of(llm)._lookahead._decoder, []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda tokens, *rest: batches.append(len(tokens)) or decode(tokens, *rest))
    before = counted(llm, "probes")

    outcome = harness.run_on(llm, job)

    results = check(job, outcome, references, min_compactions=1)
    num_draft = num_question = 0
    for number, (prompt, method, result) in enumerate(zip(job.prompts, job.policies, results, strict=True)):
        settings = settings_of(job, number)
        is_long = len(prompt) > settings.budget
        at_end = [e for e in result.events if e.num_logical == len(prompt)]
        assert len(at_end) == (is_long and method != "snapkv"), (number, method)
        if "kv_defer_prompt" in arguments and at_end:
            assert result.events[0].num_resident == len(prompt)
        num_draft += is_long and method == "laq"
        if method == "finch" and settings.ask_chunks:
            num_question += sum(e.num_logical < len(prompt) for e in result.events)
    assert num_draft == 4
    assert (num_question > 5) == (arguments.get("kv_policy") == "finch")
    assert sum(batches) == num_draft + num_question == counted(llm, "probes") - before
    # With granularity "sentence", a cached prompt is computed again for its sentences.
    assert outcome.skipped.keys() <= {"cached_prompt_sentences"}
    assert outcome.num_preemptions == [0] * len(job.prompts)
    if not arguments:
        assert max(batches) == 2, "no two prompts ended together"
        assert outcome.num_cached[1] == 5 * PAGE


def test_a_question_on_runner_v2(references: ReferenceCache) -> None:
    """Few tokens, because the interpreter is slow."""
    prompts = harness.demo_prompts(2, at_least=150)
    arguments = ARGUMENTS | {"kv_policy": "finch", "kv_request_policies": [], "kv_defer_prompt": True}
    options = [{"kv_task_tokens": 5}, {}]
    job = Job(prompts, ["finch", "finch"], 40, every=2, arguments=arguments, options=options)
    results = check(job, harness.run(job, "v2"), references, min_compactions=2)
    assert [result.events[0].num_logical for result in results] == [len(prompt) for prompt in prompts]


def test_lookahead_on_runner_v2(references: ReferenceCache) -> None:
    """A question between chunks and a draft of the answer, each on lookahead blocks."""
    prompts = harness.demo_prompts(2, at_least=150)
    arguments = ARGUMENTS | {
        "kv_policy": "finch",
        "kv_policy_config": {"ask_chunks": True},
        "kv_request_policies": ["laq"],
        "async_scheduling": True,
    }
    job = Job(prompts, ["finch", "laq"], 24, every=2, arguments=arguments)
    results = check(job, harness.run(job, "v2"), references, min_compactions=2)
    asked = [event.num_logical for event in results[0].events if event.num_logical < len(prompts[0])]
    assert asked, "the question was never put to a chunk"
    assert len(prompts[1]) in [event.num_logical for event in results[1].events]


def test_a_preempted_request_decodes_ahead_again(references: ReferenceCache) -> None:
    """The first request grows until the second one is preempted; the second one resumes when the first has finished."""
    prompts = [*harness.demo_prompts(1, at_least=90), *harness.demo_prompts(1, at_least=150)]
    arguments = ARGUMENTS | {"kv_admission": "optimistic", "num_gpu_blocks_override": 13, "async_scheduling": True}
    job = Job(prompts, ["full", "laq"], 180, every=1, arguments=arguments)
    llm = harness.engine(**arguments)
    before = counted(llm, "probes")

    outcome = harness.run_on(llm, job)

    assert outcome.num_preemptions[0] == 0 < outcome.num_preemptions[1]
    assert counted(llm, "probes") - before >= 2
    assert outcome.skipped == {}
    check(job, outcome, references, min_compactions=1)


def test_without_pages_to_decode_ahead_the_window_decides_and_that_is_counted(references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(2, at_least=150)
    arguments = ARGUMENTS | {"kv_admission": "optimistic", "num_gpu_blocks_override": 13}
    job = Job(prompts, ["full", "laq"], 30, every=4, arguments=arguments)
    llm = harness.engine(**arguments)
    before = counted(llm, "probes")

    outcome = harness.run_on(llm, job)

    assert outcome.skipped == {"no_pages_for_probe": 1}
    assert counted(llm, "probes") == before
    settings = settings_of(job, 1)
    windowed = type(settings)(**vars(settings) | {"lookahead": 0})
    assert outcome.tokens[1] == references.get(prompts[1], 30, windowed, outcome.traces[1]).tokens
    with pytest.raises(VLLMValidationError, match=r"compacted, plus 208 for tokens computed ahead\); .* lower kv_b"):
        harness.run_on(llm, Job([prompts[0] * 3], ["laq"], 900, 1, arguments, budgets=[200]))
