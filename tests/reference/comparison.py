"""Compare an engine with the oracle: its tokens, its survivors and the size of its requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from tests import harness
from tests.harness import PAGE, Job, Outcome
from tests.reference.model import Model
from tests.reference.references import ReferenceCache, Replays
from tests.reference.settings import Result, Settings

MAX_TIE_SHARE = 1e-3
BY_POSITION = ("streaming_llm", "random")


class Tolerance(NamedTuple):
    """How much rounding may change.

    Attributes:
        most, mean: change of a token's log probability.
        survivors: share of the survivors that may differ.
    """

    most: float
    mean: float
    survivors: float


UNPROTECTED = {"kv_protect_prompt": False, "kv_budget": 96, "kv_buffer": 32}


def another_question(prompt: list[int]) -> list[int]:
    """A prompt that shares all but its end with another one."""
    text = harness.tokenizer().decode(prompt, skip_special_tokens=True)
    return harness.chat_prompt(text.removeprefix("user\n").rpartition("What is")[0] + "Which value came last?")


def draft_slots(job: Job) -> int:
    """Slots that drafts may take beyond the tokens of a request: those of a step, and those that a drafter writes."""
    speculation = job.arguments.get("speculative_config")
    if not speculation:
        return 0
    number, num_steps = speculation["num_speculative_tokens"], 1 + job.arguments["async_scheduling"]
    return num_steps * (1 + number) - 1 + (number if "model" in speculation or speculation["method"] == "mtp" else 0)


def settings_of(job: Job, number: int) -> Settings:
    """Method and limits of a request of a job."""
    arguments = harness.POLICY_ARGUMENTS | {"kv_granularity": "head", "kv_protect_prompt": True} | job.arguments
    if job.policies[number] == "full":
        return Settings("streaming_llm", "head", 10**6, 1)
    budget, parameters = job.budgets[number] if job.budgets else None, arguments["kv_policy_config"]
    return Settings(
        job.policies[number],
        arguments["kv_granularity"],
        budget or arguments["kv_budget"],
        arguments["kv_buffer"],
        protect_prompt=arguments["kv_protect_prompt"],
        defer_prompt=arguments.get("kv_defer_prompt", False),
        parameters=tuple(parameters.items()) if job.policies[number] == arguments["kv_policy"] else (),
        recall_share=arguments.get("kv_recall_share", 0.0) if arguments.get("kv_recall_memory") else 0.0,
        recall_interval=arguments.get("kv_recall_interval", 32),
        recall_threshold=arguments.get("kv_recall_threshold", 24.0),
        num_question=(job.options[number] if job.options else {}).get("kv_task_tokens", 8),
        **(arguments["kv_policy_config"] if job.policies[number] == arguments["kv_policy"] in ("laq", "finch") else {}),
    )


def check(
    job: Job,
    outcome: Outcome,
    references: ReferenceCache | Replays,
    min_compactions: int,
    max_tie_share: float = MAX_TIE_SHARE,
) -> list[Result]:
    """Compare all requests of a job with the oracle and with their limits.

    A preempted request repeats the same compactions in each of its lives, as far as the life goes.
    """
    results = []
    for number, (prompt, method) in enumerate(zip(job.prompts, job.policies, strict=True)):
        settings, trace = settings_of(job, number), outcome.traces[number]
        last_life = trace.life == outcome.num_preemptions[number]
        kept = [positions for positions, is_last in zip(trace.kept, last_life.tolist(), strict=True) if is_last]
        last = SimpleNamespace(logical_length=trace.logical_length[last_life], kept=kept)
        result = references.get(prompt, len(outcome.tokens[number]), settings, last)
        results.append(result)
        name = f"request {number} ({method})"
        assert outcome.tokens[number] == result.tokens, name
        if method == "full":
            assert not trace.kept, name
            continue
        assert trace.parameters["request_policy"] == method

        # A compaction counts if the oracle made it, the workers traced it and the scheduler freed its blocks.
        assert len(result.events) >= min_compactions, name
        assert len(last.kept) == len(result.events), name
        for life in range(outcome.num_preemptions[number] + 1):
            logical, resident = (x[trace.life == life].tolist() for x in (trace.logical_length, trace.resident_before))
            events = result.events[: len(logical)]
            assert logical == [e.num_logical for e in events], name
            assert resident == [e.num_resident for e in events], name
        evicted = [0]
        for event in result.events:
            evicted.append(evicted[-1] + event.num_resident - event.kept.shape[2])
        samples = [s for s in outcome.samples if s.request == number]
        seen, evicted = sorted({s.num_evicted for s in samples}), sorted(set(evicted))
        # With drafts a request may end in the step of its last compaction.
        assert seen == evicted or (draft_slots(job) and seen == evicted[:-1]), name

        bound, page = settings.bound(len(prompt), is_first=True), job.arguments.get("block_size", PAGE)
        for sample in samples:
            assert sample.num_resident <= bound, (name, sample)
            assert sample.num_pages <= -(-(bound + draft_slots(job)) // page), (name, sample)

    num_ties = sum(result.num_ties for result in results)
    num_selected = sum(result.num_selected for result in results)
    num_compactions = sum(len(result.events) for result in results)
    print(f"{num_ties} near ties of {num_selected} selections, {num_compactions} compactions")
    assert num_ties <= max_tie_share * num_selected
    return results


def check_replayed(job: Job, outcome: Outcome, model: Model, tolerance: Tolerance) -> list[Result]:
    """As `check`, for an engine that rounds more than float32 does: the oracle follows its tokens and survivors.

    Methods that choose by position do not depend on rounding; their survivors must be equal.
    """
    settings = [settings_of(job, number) for number in range(len(job.prompts))]
    keys = [(tuple(prompt), each) for prompt, each in zip(job.prompts, settings, strict=True)]
    assert len(set(keys)) == len(keys), "two requests would be mistaken for each other"
    replays = Replays(model, dict(zip(keys, outcome.tokens, strict=True)))
    results = check(job, outcome, replays, min_compactions=2, max_tie_share=tolerance.survivors)
    for number, result in enumerate(results):
        name = f"request {number} ({job.policies[number]})"
        if job.policies[number] in BY_POSITION:
            assert result.num_ties == 0, name
        own = [by_token[token] for by_token, token in zip(outcome.logprobs[number], result.tokens, strict=True)]
        error = [abs(a - b) for a, b in zip(own, result.logprobs, strict=True)]
        print(
            f"{name}: {len(result.events)} compactions, {result.num_ties} of {result.num_selected} survivors differ, "
            f"log probabilities {sum(error) / len(error):.1e} off on average, {max(error):.1e} at most; "
            f"likelier tokens by {max(result.gaps):.1e} at most"
        )
        assert max(result.gaps) <= tolerance.most, name
        assert max(error) <= tolerance.most, name
        assert sum(error) / len(error) <= tolerance.mean, name
    return results
