"""Speculative decoding beside eviction: the engine equals the oracle, which decodes one token at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams

from skipkv_vllm import bundled_gates
from skipkv_vllm.integration.drafters import ResidentDrafter
from tests import harness
from tests.draft_models import DRAFTERS, Scripted, scripted
from tests.engine import test_gates as gates
from tests.engine import test_steering as steering
from tests.harness import PAGE, Job
from tests.reference.comparison import UNPROTECTED, another_question, check
from tests.soak import SPECULATIVE, Soak, runner_of

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

LONG, NUM_NEW = 150, 400
SIZES: dict[str, Any] = {"kv_budget": 160, "kv_buffer": 48, "kv_request_policies": ["h2o", "random"]}
METHODS = ["skipkv", "rkv", "h2o", "skipkv", "random", "skipkv"]
GRANULARITIES = ("head", "sentence")
MODES = [
    *(("ngram", False, "head"), ("eagle", False, "sentence"), ("eagle", True, "head")),
    *(("mtp", False, "head"), ("mtp", True, "sentence"), ("draft_model", True, "head")),
]
ALL = [
    *itertools.product(["ngram"], [False], GRANULARITIES),
    *itertools.product(("eagle", "mtp", "draft_model"), (False, True), GRANULARITIES),
]
"""vLLM has no asynchronous scheduling for its search of n-grams on the host, and needs a GPU for the other one."""
MODES_V2 = [("ngram_gpu", True, "head"), ("eagle", True, "head"), ("mtp", False, "sentence")]
ALL_V2 = list(itertools.product(("ngram_gpu", "eagle", "mtp"), (False, True), GRANULARITIES))


def job_of(drafter: str, is_async: bool, **arguments: Any) -> Job:
    """Six requests, the last of which finds most of the first one's prompt in the prefix cache."""
    prompts = [*harness.demo_prompts(2, at_least=LONG), *harness.demo_prompts(3)]
    arguments = SIZES | DRAFTERS[drafter]() | {"async_scheduling": is_async} | arguments
    return Job([*prompts, another_question(prompts[0])], METHODS, NUM_NEW, 7, arguments)


def test_engine_equals_reference(mode: tuple[str, bool, str], references: ReferenceCache) -> None:
    drafter, is_async, granularity = mode
    job = job_of(drafter, is_async, kv_granularity=granularity)
    outcome = harness.run(job)
    assert outcome.is_async is is_async
    assert outcome.num_cached[-1] >= 4 * PAGE, "the prefix cache was not hit"
    assert 0.2 < outcome.acceptance < 0.9
    check(job, outcome, references, min_compactions=3)


def shortened(job: Job) -> Job:
    """Take three of the requests and less of their texts, for the slow interpreter."""
    arguments = job.arguments | {"kv_budget": 72, "kv_buffer": 24}
    return dataclasses.replace(job, prompts=job.prompts[2:5], policies=METHODS[2:5], num_new=110, arguments=arguments)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Without `--every-mode` some modes run, and in the slow interpreter with short texts."""
    every = metafunc.config.getoption("every_mode")
    for name, modes in (("mode", ALL if every else MODES), ("mode_v2", ALL_V2 if every else MODES_V2)):
        if name in metafunc.fixturenames:
            ids = [f"{drafter}-{'async' if is_async else 'sync'}-{how}" for drafter, is_async, how in modes]
            metafunc.parametrize(name, modes, ids=ids)


def test_runner_v2_equals_reference(
    mode_v2: tuple[str, bool, str],
    references: ReferenceCache,
    pytestconfig: pytest.Config,
) -> None:
    drafter, is_async, granularity = mode_v2
    job = job_of(drafter, is_async, kv_granularity=granularity)
    if not pytestconfig.getoption("every_mode"):
        job = shortened(job)
    outcome = harness.run(job, "v2")
    assert (outcome.is_v2, outcome.is_async) == (True, is_async)
    results = check(job, outcome, references, min_compactions=3)
    print(f"{outcome.acceptance:.1%} of the drafts accepted, compactions {[len(each.events) for each in results]}")
    assert 0.2 < outcome.acceptance < 0.9


@pytest.mark.parametrize(("drafter", "runner"), [("eagle3", "v1"), ("eagle3", "v2"), ("draft_model", "v2")])
def test_other_drafters(drafter: str, runner: str, references: ReferenceCache) -> None:
    job = shortened(job_of(drafter, is_async=True))
    outcome = harness.run(job, runner)
    assert outcome.acceptance < 0.1 if drafter == "eagle3" else 0.2 < outcome.acceptance < 0.9
    check(job, outcome, references, min_compactions=3)


def test_suffixes(references: ReferenceCache) -> None:
    pytest.importorskip("arctic_inference", reason="pip install --no-deps arctic-inference")
    job = job_of("suffix", is_async=False)
    outcome = harness.run(job)
    print(f"{outcome.acceptance:.1%} of the drafts accepted")
    assert 0.2 < outcome.acceptance < 0.9
    check(job, outcome, references, min_compactions=3)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_equals_stock_without_eviction(runner: str) -> None:
    for drafter in ("eagle", "mtp"):
        prompts, num_new = harness.demo_prompts(4), 100 if runner == "v1" else 20
        if (drafter, runner) == ("mtp", "v2"):
            continue  # slow in the interpreter
        arguments = DRAFTERS[drafter]()
        expected = harness.run(Job(prompts, [], num_new, every=5, arguments=arguments, num_logprobs=5), runner)
        arguments = SIZES | arguments | {"kv_budget": 1024}
        job = Job(prompts, ["skipkv", "full"] * 2, num_new, every=5, arguments=arguments, num_logprobs=5)
        outcome = harness.run(job, runner)
        assert not any(len(trace.kept) for trace in outcome.traces)
        assert (outcome.tokens, outcome.logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize(
    ("rule", "least", "most"),
    [(lambda _: False, 1, 1), (lambda _: True, 0, 0), (lambda place: place % 7 < 2, 0.4, 0.8)],
    ids=["right", "wrong", "some"],
)
def test_any_number_of_drafts_may_be_rejected_before_a_compaction(
    rule: Callable[[int], bool], least: float, most: float, references: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("ngram", is_async=False)
    answers = harness.run(dataclasses.replace(job, arguments=job.arguments | {"speculative_config": None})).tokens
    texts = [prompt + answer for prompt, answer in zip(job.prompts, answers, strict=True)]
    monkeypatch.setattr(Scripted, "texts", texts)
    monkeypatch.setattr(Scripted, "is_wrong", staticmethod(rule))
    job = dataclasses.replace(job, arguments=job.arguments | scripted())
    outcome = harness.run(job)
    assert least <= outcome.acceptance <= most
    check(job, outcome, references, min_compactions=3)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_preempted_request_resumes_to_the_same_tokens(is_async: bool, references: ReferenceCache) -> None:
    job = job_of("eagle", is_async, kv_admission="optimistic", num_gpu_blocks_override=24)
    outcome = harness.run(job)
    assert sum(outcome.num_preemptions) > 0, "the pool is too large for this test to show anything"
    check(job, outcome, references, min_compactions=3)


def test_prompts_that_are_not_protected(references: ReferenceCache) -> None:
    """Prompts are compacted while they are computed; segments end at counts of their own."""
    parameters = {"segment": 32, "transition_above": 0.56, "execution_below": 0.54, "layers": "1,3"}
    arguments = UNPROTECTED | {"kv_policy": "thinkv", "kv_policy_config": parameters, "kv_request_policies": ["rkv"]}
    job = job_of("mtp", is_async=True, **arguments)
    job = dataclasses.replace(job, policies=["thinkv", "rkv"] * 3, num_new=200)
    check(job, harness.run(job), references, min_compactions=3)


def test_learned_gates(references: ReferenceCache) -> None:
    arguments = gates.GATES | {"kv_request_policies": []}
    job = dataclasses.replace(job_of("eagle", is_async=True, **arguments), policies=["trimkv"] * 6)
    if not references.model.gates:
        references.model.load_gates(bundled_gates())
    check(job, harness.run(job), references, min_compactions=3)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_steering_follows_accepted_tokens(is_async: bool, references: ReferenceCache) -> None:
    job = steering.mixed_job(300, **DRAFTERS["eagle"](), async_scheduling=is_async)
    outcome = harness.run(job)
    assert outcome.acceptance < 0.9
    steering.check(job, outcome, references)


@pytest.mark.parametrize("drafter", ["eagle", "draft_model"])
def test_a_drafter_writes_to_blocks_of_its_requests(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs would not show it: the model checks what a drafter proposes."""
    move, checked = ResidentDrafter._move, []

    def check_slots(self: Any, slots: Any, table: Any, rows: Any, block_size: int) -> None:
        move(self, slots, table, rows, block_size)
        for slot, row in zip(slots[: len(rows)].tolist(), rows.tolist(), strict=True):
            own = tables.block_table.np[row, : tables.num_blocks_per_row[row]]
            checked.append(slot < 0 or slot // block_size in own)

    job = job_of(drafter, is_async=True)
    llm = harness.engine(**job.arguments)
    tables = runner_of(llm)._evicting_table()
    monkeypatch.setattr(ResidentDrafter, "_move", check_slots)
    harness.run_on(llm, job)
    assert len(checked) > 1000
    assert all(checked)


def test_a_soak_loses_no_page() -> None:
    llm = harness.engine(**SPECULATIVE, **DRAFTERS["eagle"]())
    report = Soak(llm, seed=0, repeats=4).run(600)
    assert report.aborted > 20
    assert report.steered_tokens > 100
    assert report.compactions > 600


def test_placeholders_of_drafts_are_left_alone(references: ReferenceCache) -> None:
    """vLLM adds them to a request that starts with one token: a prompt of one, or one that the prefix cache has."""
    prompt = harness.demo_prompts(1, at_least=193)[0][:193]
    # No trace, because a traced request is managed although it is never compacted.
    sizes = {"kv_budget": 160, "kv_buffer": 33, "kv_policy": "streaming_llm", "kv_trace_dir": None}
    llm = harness.engine(**DRAFTERS["ngram"](), **sizes, kv_protect_prompt=False, async_scheduling=False)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 1, 300, 300)]
    for prompts, each in (([prompt], params[:1]), ([prompt], params[1:2]), ([[5], [7]], params[2:])):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], each, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in each]
    harness.assert_pool_empty(llm)


def test_a_request_may_fill_the_pool_to_the_last_token() -> None:
    """Behind the longest text vLLM stores no draft, so none is promised a slot there."""
    sizes = {"max_model_len": 512, "num_gpu_blocks_override": 512 // PAGE + 1, "async_scheduling": False}
    llm = harness.engine(**SIZES, **DRAFTERS["ngram"](), **sizes)
    (prompt,) = harness.demo_prompts(1)
    params = SamplingParams(
        temperature=0, max_tokens=512 - len(prompt), ignore_eos=True, extra_args={"kv_policy": "full"}
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 512 - len(prompt)


def test_drafts_are_as_good_as_without_eviction() -> None:
    """A copy of the model proposes nearly always the right token, if it reads the KV of the right tokens."""
    jobs = [job_of("draft_model", is_async=True, kv_budget=budget) for budget in (224, 1024)]
    evicting, full = (harness.run(job).acceptance for job in jobs)
    assert full > 0.2
    assert evicting > full - 0.1
