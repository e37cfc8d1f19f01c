"""The engine equals the Hugging Face reference token for token, and holds what it may hold, no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import engines
from tests.engines import PAGE, Job, Outcome
from tests.hf_reference import Result, Settings, generate

if TYPE_CHECKING:
    from tests.hf_reference import ReferenceCache

METHODS = ("skipkv", "rkv", "streaming_llm")
BASELINES = ("h2o", "snapkv", "random")
NUM_NEW = 400
BUDGET, BUFFER = 224, 64
UNPROTECTED = {"kv_protect_prompt": False, "kv_budget": 96, "kv_buffer": 32}
MAX_TIE_SHARE = 1e-3
# Longer than the bound without protection, computed in two chunks, and several pages to share.
LONG = 150


@pytest.fixture(scope="module", params=["head", "sentence"])
def granularity(request: pytest.FixtureRequest) -> str:
    """Of the module's scope, so that pytest runs all tests of an engine in a row."""
    return request.param


def another_question(prompt: list[int]) -> list[int]:
    """A prompt that shares all but the end with another one."""
    text = engines.tokenizer().decode(prompt, skip_special_tokens=True)
    return engines.chat_prompt(text.removeprefix("user\n").rpartition("What is")[0] + "Which value came last?")


def long_prompt() -> list[int]:
    """A prompt longer than the budget."""
    (prompt,) = engines.demo_prompts(1, at_least=BUDGET + 1)
    return prompt


def check(job: Job, outcome: Outcome, references: ReferenceCache, min_compactions: int) -> list[Result]:
    """Compare all requests of a job with the reference and with their limits."""
    arguments = engines.POLICY_ARGUMENTS | {"kv_granularity": "head", "kv_protect_prompt": True} | job.arguments
    results = []
    for number, (prompt, method) in enumerate(zip(job.prompts, job.policies, strict=True)):
        settings = Settings(
            method,
            arguments["kv_granularity"],
            arguments["kv_budget"],
            arguments["kv_buffer"],
            protect_prompt=arguments["kv_protect_prompt"],
        )
        trace = outcome.traces[number]
        result = references.get(prompt, len(outcome.tokens[number]), settings, trace)
        results.append(result)
        name = f"request {number} ({method})"
        assert outcome.tokens[number] == result.tokens, name
        assert trace.parameters["request_policy"] == method

        # A compaction counts if the reference made it, the workers traced it and the scheduler freed it.
        assert len(result.events) >= min_compactions, name
        assert trace.logical_length.tolist() == [e.num_logical for e in result.events], name
        assert trace.resident_before.tolist() == [e.num_resident for e in result.events], name
        assert len(trace.kept) == len(result.events)
        evicted = [0]
        for event in result.events:
            evicted.append(evicted[-1] + event.num_resident - event.kept.shape[2])
        samples = [s for s in outcome.samples if s.request == number]
        assert sorted({s.num_evicted for s in samples}) == evicted, name

        bound = settings.keep(len(prompt)) + settings.buffer
        pages = -(-bound // PAGE) + 1
        for sample in samples:
            # A prompt is computed in full before the first eviction, however long it is.
            if sample.num_logical > len(prompt):
                assert sample.num_resident <= bound, (name, sample)
                assert sample.num_pages <= pages, (name, sample)

    num_ties = sum(result.num_ties for result in results)
    num_selected = sum(result.num_selected for result in results)
    num_compactions = sum(len(result.events) for result in results)
    print(f"{num_ties} near ties of {num_selected} selections, {num_compactions} compactions")
    assert num_ties < MAX_TIE_SHARE * num_selected
    return results


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_engine_equals_reference(runner: str, granularity: str, references: ReferenceCache) -> None:
    first, *longer = engines.demo_prompts(3, at_least=LONG)
    prompts = [first, *longer, *engines.demo_prompts(3), long_prompt(), another_question(first)]
    if runner == "v1":
        # Twice as many requests as run at once: the later ones wait for a place.
        pairs = [(prompt, method) for prompt in prompts for method in METHODS]
        pairs += [(prompt, method) for prompt in (prompts[1], *prompts[-2:]) for method in BASELINES]
        job_prompts, policies = (list(column) for column in zip(*pairs, strict=True))
    else:
        # The interpreter is slow: every prompt once, with the methods mixed.
        job_prompts = prompts
        policies = ["skipkv", "rkv", "h2o", "streaming_llm", "skipkv", "snapkv", "random", "skipkv"]
    job = Job(job_prompts, policies, NUM_NEW, every=7, arguments={"kv_granularity": granularity})

    outcome = engines.run(job, runner)

    assert outcome.is_v2 == (runner == "v2")
    assert outcome.num_cached[-1] >= 4 * PAGE, "the prefix cache was not hit"
    repeats = [len(t.similar_pairs) for t, policy in zip(outcome.traces, policies, strict=True) if policy == "skipkv"]
    assert sum(count > 0 for count in repeats) > len(repeats) / 2, "without repeated sentences skipkv is rkv"
    check(job, outcome, references, min_compactions=3)


def test_shared_pages_are_not_overwritten(granularity: str, references: ReferenceCache) -> None:
    """The second prompt holds pages with the first one's output, which the first one then compacts."""
    (first,) = engines.demo_prompts(1, at_least=LONG)
    # A little before the first compaction, which comes at budget + buffer tokens.
    num_copied = BUDGET + BUFFER - len(first) - 8
    unlimited = Settings("rkv", granularity, 2048, 64)
    text = generate(references.model, first, num_copied, unlimited).tokens
    job = Job(
        [first, first + text],
        ["rkv", "skipkv"],
        250,
        # The first must have computed the copied text when the second one arrives, and not be compacted yet.
        every=num_copied + 5,
        arguments={"kv_granularity": granularity},
    )

    outcome = engines.run(job)

    assert outcome.num_cached[1] > len(first), "no page of output was shared"
    assert outcome.traces[0].logical_length[0] > len(first + text), "compacted before the pages were shared"
    check(job, outcome, references, min_compactions=2)


def test_abort(granularity: str, references: ReferenceCache) -> None:
    prompts = engines.demo_prompts(6, at_least=LONG)
    policies = list(METHODS) * 2
    # Aborted: one in the middle of its prompt, one before its first compaction, one after several.
    job = Job(
        prompts,
        policies,
        300,
        every=3,
        arguments={"kv_granularity": granularity},
        abort_at={1: 4, 3: 60, 4: 280},
    )

    outcome = engines.run(job)

    assert outcome.tokens[1] == []
    assert 0 < len(outcome.tokens[3]) < len(outcome.tokens[4]) < job.num_new
    assert len(outcome.traces[4].kept) >= 2
    survivors = [0, 2, 5]
    rest = Job([prompts[i] for i in survivors], [policies[i] for i in survivors], 300, 3, job.arguments)
    kept = Outcome(
        tokens=[outcome.tokens[i] for i in survivors],
        logprobs=[],
        num_cached=[outcome.num_cached[i] for i in survivors],
        traces=[outcome.traces[i] for i in survivors],
        samples=[s._replace(request=survivors.index(s.request)) for s in outcome.samples if s.request in survivors],
        is_v2=outcome.is_v2,
    )
    assert all(len(tokens) == job.num_new for tokens in kept.tokens)
    check(rest, kept, references, min_compactions=2)


def test_unprotected_prompt(granularity: str, references: ReferenceCache) -> None:
    """A prompt longer than budget + buffer is compacted before the first output token is computed."""
    # The model writes one delimiter at a time; a prompt can hold several in a row.
    delimiters = references.model.delimiters
    newline = min(i for i in delimiters if engines.tokenizer().decode([i]) == "\n")
    prompts = [
        [token for t in prompt for token in ([t, newline] if t in delimiters else [t])]
        for prompt in engines.demo_prompts(6, at_least=LONG)
    ]
    job = Job(
        prompts,
        ["rkv", "skipkv"] * 3,
        200,
        every=3,
        arguments={"kv_granularity": granularity} | UNPROTECTED,
    )

    outcome = engines.run(job)

    # Cached tokens have no hidden states, so a hit would change which sentences exist.
    assert outcome.num_cached == [0] * len(prompts)
    results = check(job, outcome, references, min_compactions=3)
    assert [result.events[0].num_logical for result in results] == [len(prompt) for prompt in prompts]
    assert all((result.events[0].kept < len(prompts[i]) - 8).any() for i, result in enumerate(results))


def test_unprotected_shared_prompt(references: ReferenceCache) -> None:
    """Pages of a prompt that two requests hold and both compact."""
    (first,) = engines.demo_prompts(1, at_least=LONG)
    # The second arrives when the first has computed one chunk, and is compacted while the second holds it.
    job = Job([first, another_question(first)], ["rkv", "streaming_llm"], 150, every=1, arguments=UNPROTECTED)

    outcome = engines.run(job)

    assert outcome.num_cached[1] >= 3 * PAGE
    check(job, outcome, references, min_compactions=3)
