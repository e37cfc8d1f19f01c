"""The engine equals the oracle token for token, and its requests hold no more than their limits allow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from tests import harness
from tests.harness import PAGE, Job, Outcome
from tests.reference.comparison import UNPROTECTED, another_question, check
from tests.reference.request import generate
from tests.reference.settings import Settings

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

METHODS = ("skipkv", "rkv", "streaming_llm")
BASELINES = ("h2o", "snapkv", "random")
NUM_NEW = 400
BUDGET, BUFFER = 224, 64
# Longer than the bound without protection, computed in two chunks, and with several blocks to share.
LONG = 150


@pytest.fixture(scope="module", params=["head", "sentence"])
def granularity(request: pytest.FixtureRequest) -> str:
    """Module scope, so that pytest runs all tests of an engine in a row."""
    return request.param


def long_prompt() -> list[int]:
    """A prompt longer than the budget."""
    (prompt,) = harness.demo_prompts(1, at_least=BUDGET + 1)
    return prompt


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_engine_equals_reference(runner: str, granularity: str, references: ReferenceCache) -> None:
    first, *longer = harness.demo_prompts(3, at_least=LONG)
    prompts = [first, *longer, *harness.demo_prompts(3), long_prompt(), another_question(first)]
    if runner == "v1":
        # Twice as many requests as can run at once: the later ones wait.
        pairs = [(prompt, method) for prompt in prompts for method in METHODS]
        pairs += [(prompt, method) for prompt in (prompts[1], *prompts[-2:]) for method in BASELINES]
        job_prompts, policies = (list(column) for column in zip(*pairs, strict=True))
    else:
        # The interpreter is slow, so each prompt runs once and the methods are mixed.
        job_prompts = prompts
        policies = ["skipkv", "rkv", "h2o", "streaming_llm", "skipkv", "snapkv", "random", "skipkv"]
    job = Job(job_prompts, policies, NUM_NEW, every=7, arguments={"kv_granularity": granularity})

    outcome = harness.run(job, runner)

    assert outcome.is_v2 == (runner == "v2")
    assert outcome.num_cached[-1] >= 4 * PAGE, "the prefix cache was not hit"
    repeats = [len(t.similar_pairs) for t, policy in zip(outcome.traces, policies, strict=True) if policy == "skipkv"]
    assert sum(count > 0 for count in repeats) > len(repeats) / 2, (
        "the texts repeat no sentence, so skipkv keeps what rkv keeps"
    )
    check(job, outcome, references, min_compactions=3)


def test_triton_attention_and_pages_of_gpus_equal_the_reference(references: ReferenceCache) -> None:
    """vLLM's Triton attention and the page layout of GPUs, in the slow interpreter."""
    (prompt,) = harness.demo_prompts(1, at_least=LONG)
    arguments = {"kv_granularity": "head", "kv_budget": 160, "kv_buffer": 4}
    job = Job([prompt, another_question(prompt)], ["skipkv", "h2o"], 19, every=3, arguments=arguments)

    (outcome,) = harness.run_in_child([job], interpreted=True, triton_attention=True)

    assert (outcome.is_v2, outcome.attention) == (True, "TritonAttentionImpl")
    assert outcome.num_cached[1] >= 4 * PAGE
    check(job, outcome, references, min_compactions=2)


def test_the_rule_of_the_paper(granularity: str, references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(3, at_least=LONG)
    # Repeats of a sentence in the bundled model's thoughts have a cosine of 0.74 to 0.87.
    parameters = {"compat": "paper", "similarity_threshold": 0.85}
    arguments = {"kv_granularity": granularity, "kv_policy_config": parameters}
    job = Job(prompts, ["skipkv", "skipkv", "rkv"], NUM_NEW, every=7, arguments=arguments)
    outcome = harness.run(job)
    assert all(len(trace.similar_pairs) > 0 for trace in outcome.traces[:2]), (
        "the texts repeat no sentence, so skipkv keeps what rkv keeps"
    )
    check(job, outcome, references, min_compactions=3)


def test_methods_of_the_literature(references: ReferenceCache) -> None:
    """Run all of them together, each with its own prompt; `check` counts their blocks."""
    prompts = harness.demo_prompts(len(harness.PUBLISHED), at_least=LONG)
    job = Job(prompts, list(harness.PUBLISHED), 250, every=3, arguments={"kv_granularity": "head"})
    check(job, harness.run(job), references, min_compactions=2)


def segment_job(**arguments: Any) -> Job:
    """Requests whose segments shrink, beside a request of another method."""
    prompts = harness.demo_prompts(3, at_least=LONG)
    parameters = {"segment": 32, "transition_above": 0.56, "execution_below": 0.54, "layers": "1,3"}
    arguments |= {"kv_policy": "thinkv", "kv_policy_config": parameters, "kv_request_policies": ["rkv"]}
    methods = ["thinkv", "thinkv", "rkv", "thinkv"]
    return Job([*prompts, another_question(prompts[0])], methods, 260, every=7, arguments=arguments)


def check_segments(job: Job, outcome: Outcome, references: ReferenceCache) -> None:
    """Run `check`, and verify that every kind of segment occurs."""
    found = [sparsity for each in check(job, outcome, references, min_compactions=3) for sparsity in each.sparsities]
    assert min(found) < 0.54
    assert any(0.54 < sparsity < 0.56 for sparsity in found)
    assert max(found) > 0.56


def test_segments(references: ReferenceCache) -> None:
    job = segment_job()
    outcome = harness.run(job)
    assert outcome.num_cached[-1] >= 4 * PAGE, "the last prompt was not found in the prefix cache"
    check_segments(job, outcome, references)


def test_segments_of_unprotected_prompts(references: ReferenceCache) -> None:
    """Segments begin with the prompt, which is computed segment by segment, its cached part too."""
    job = segment_job(**UNPROTECTED)
    outcome = harness.run(job)
    assert outcome.num_cached == [0, 0, outcome.num_cached[2], 0]
    results = check(job, outcome, references, min_compactions=3)
    assert len(results[0].sparsities) == (len(job.prompts[0]) + job.num_new - 1) // 32


def test_shared_pages_are_not_overwritten(granularity: str, references: ReferenceCache) -> None:
    """The second request shares blocks of the first one's output, and the first one then compacts them."""
    (first,) = harness.demo_prompts(1, at_least=LONG)
    # Shortly before the first compaction, which comes at budget + buffer tokens.
    num_copied = BUDGET + BUFFER - len(first) - 8
    unlimited = Settings("rkv", granularity, 2048, 64)
    text = generate(references.model, first, num_copied, unlimited).tokens
    job = Job(
        [first, first + text],
        ["rkv", "skipkv"],
        250,
        # When the second request arrives, the first must have computed the copied text and must not be compacted yet.
        every=num_copied + 5,
        arguments={"kv_granularity": granularity},
    )

    outcome = harness.run(job)

    assert outcome.num_cached[1] > len(first), "no block of output was shared"
    assert outcome.traces[0].logical_length[0] > len(first + text), "compacted before the blocks were shared"
    check(job, outcome, references, min_compactions=2)


def test_abort(granularity: str, references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(6, at_least=LONG)
    policies = list(METHODS) * 2
    # Abort one request within its prompt, one before its first compaction and one after several.
    job = Job(
        prompts,
        policies,
        300,
        every=3,
        arguments={"kv_granularity": granularity},
        abort_at={1: 4, 3: 60, 4: 280},
    )

    outcome = harness.run(job)

    assert outcome.tokens[1] == []
    assert 0 < len(outcome.tokens[3]) < len(outcome.tokens[4]) < job.num_new
    assert len(outcome.traces[4].kept) >= 2
    survivors = [0, 2, 5]
    rest = Job([prompts[i] for i in survivors], [policies[i] for i in survivors], 300, 3, job.arguments)
    kept = dataclasses.replace(
        outcome,
        tokens=[outcome.tokens[i] for i in survivors],
        traces=[outcome.traces[i] for i in survivors],
        samples=[s._replace(request=survivors.index(s.request)) for s in outcome.samples if s.request in survivors],
    )
    assert all(len(tokens) == job.num_new for tokens in kept.tokens)
    check(rest, kept, references, min_compactions=2)


def test_unprotected_prompt(granularity: str, references: ReferenceCache) -> None:
    """A prompt longer than budget + buffer is compacted while it is computed; the cache never holds all of it."""
    # The model writes one delimiter at a time; a prompt can hold several in a row.
    delimiters = references.model.delimiters
    newline = min(i for i in delimiters if harness.tokenizer().decode([i]) == "\n")
    prompts = [
        [token for t in prompt for token in ([t, newline] if t in delimiters else [t])]
        for prompt in harness.demo_prompts(6, at_least=LONG)
    ]
    job = Job(
        prompts,
        ["rkv", "skipkv"] * 3,
        200,
        every=3,
        arguments={"kv_granularity": granularity} | UNPROTECTED,
    )

    outcome = harness.run(job)

    # Cached tokens have no hidden states, so a cache hit would change the sentences.
    assert outcome.num_cached == [0] * len(prompts)
    results = check(job, outcome, references, min_compactions=3)
    bound = UNPROTECTED["kv_budget"] + UNPROTECTED["kv_buffer"]
    assert all(len(prompt) > bound for prompt in prompts)
    assert all(result.events[0].num_logical == bound for result in results)
    assert all((result.events[0].kept < len(prompts[i]) - 8).any() for i, result in enumerate(results))


def test_unprotected_shared_prompt(references: ReferenceCache) -> None:
    """Two requests share the blocks of a prompt, and both compact them."""
    (first,) = harness.demo_prompts(1, at_least=LONG)
    # The others arrive after a chunk or two of the first; it and the second one share blocks when they are compacted.
    prompts = [first, another_question(first), another_question(first)]
    methods, budgets = ["rkv", "streaming_llm", "skipkv"], [160, 160, 160]
    job = Job(prompts, methods, 150, every=1, arguments=UNPROTECTED, budgets=budgets)

    outcome = harness.run(job)

    assert outcome.num_cached[1] >= 3 * PAGE
    # Sentences of cached tokens cannot be compared, so the third request computes them again, which is counted.
    assert outcome.num_cached[2] == 0
    assert outcome.skipped == {"cached_prompt_sentences": 1}
    check(job, outcome, references, min_compactions=3)


def test_long_unprotected_prompt(granularity: str, references: ReferenceCache) -> None:
    """A prompt of several bounds never takes more blocks than one bound, and neither does its neighbour."""
    prompts = harness.demo_prompts(2, at_least=600)
    arguments = {"kv_granularity": granularity} | UNPROTECTED
    job = Job(prompts, ["skipkv", "h2o"], 40, every=3, arguments=arguments)

    outcome = harness.run(job)

    bound = UNPROTECTED["kv_budget"] + UNPROTECTED["kv_buffer"]
    assert max(load.num_pages for load in outcome.load) <= 2 * bound // PAGE
    results = check(job, outcome, references, min_compactions=15)
    for prompt, result in zip(prompts, results, strict=True):
        in_the_prompt = [e.num_logical for e in result.events if e.num_logical < len(prompt)]
        assert in_the_prompt == list(range(bound, len(prompt), UNPROTECTED["kv_buffer"]))


def test_deferred_prompt(references: ReferenceCache) -> None:
    """A long prompt stays whole until its window is written, because the window's queries choose its survivors."""
    prompts = harness.demo_prompts(4, at_least=LONG)
    job = Job(
        prompts, ["rkv", "skipkv", "snapkv", "h2o"], 120, every=3, arguments=UNPROTECTED | {"kv_defer_prompt": True}
    )
    outcome = harness.run(job)
    results = check(job, outcome, references, min_compactions=3)
    for prompt, result in zip(prompts, results, strict=True):
        assert len(prompt) > UNPROTECTED["kv_budget"] + UNPROTECTED["kv_buffer"]
        first, second = result.events[:2]
        assert (first.num_logical, first.num_resident) == (len(prompt) + 8, len(prompt) + 8)
        assert second.num_logical == first.num_logical + UNPROTECTED["kv_buffer"]
