"""The real engine under load: many requests, random aborts and a soak; every step verifies all block bookkeeping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from tests import harness
from tests.soak import ENGINES, Report, Soak, check_nothing_left, drain, runtime_of

if TYPE_CHECKING:
    import vllm

SOAK_REQUESTS = 2000
CROWD = 100
NUM_NEW = 100
POLICIES = ["skipkv", "rkv", "streaming_llm", "h2o"]


@pytest.fixture(scope="module", params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    """Module scope, so that pytest runs all tests of an engine in a row."""
    return request.param


@pytest.fixture
def llm(kind: str) -> Iterator[vllm.LLM]:
    llm = harness.engine(**ENGINES[kind])
    yield llm
    drain(llm)
    check_nothing_left(llm)


def crowd(llm: vllm.LLM, prompts: dict[int, list[int]]) -> tuple[dict[int, list[int]], int]:
    """Return greedy answers to numbered prompts that arrive at once, and how many ran at the same time."""
    from vllm import SamplingParams

    assert llm.reset_prefix_cache()
    scheduler, most = harness.scheduler_of(llm), 0
    for number, prompt in prompts.items():
        options = {"kv_policy": POLICIES[number % len(POLICIES)]}
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, extra_args=options)
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    answers: dict[int, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            if output.finished:
                assert output.kv_transfer_params["skipkv"]["compactions"] >= 1, (
                    "the load is too small for this test to show anything"
                )
        most = max(most, len(scheduler.running))
    return answers, most


def test_1_40_and_100_concurrent_requests_give_the_same_answers(llm: vllm.LLM, kind: str) -> None:
    """All prompts share their first blocks."""
    (first,), others = harness.demo_prompts(1, at_least=100), harness.demo_prompts(CROWD)
    prompts = {number: first[: 2 * harness.PAGE + 5] + other for number, other in enumerate(others)}
    hundred, most = crowd(llm, prompts)
    assert most == CROWD if kind == "bounded" else most > 30
    forty, _ = crowd(llm, {number: prompts[number] for number in range(40)})
    alone = {number: crowd(llm, {number: prompts[number]})[0][number] for number in range(0, 40, 5)}
    assert all(len(answer) == NUM_NEW for answer in hundred.values())
    assert len({tuple(answer) for answer in hundred.values()}) > CROWD / 2, (
        "the load is too small for this test to show anything"
    )
    assert forty == {number: hundred[number] for number in forty}
    assert alone == {number: hundred[number] for number in alone}


def test_the_ring_of_queries_is_as_large_as_the_requests_that_can_run(llm: vllm.LLM) -> None:
    """R-KV's port sized it for 4096 requests: 6.13 GiB."""
    ring, config = runtime_of(llm).signals.queries, llm.llm_engine.vllm_config
    model, slots = config.model_config.hf_config, config.scheduler_config.max_num_seqs
    # As many query heads as make the hidden size, in float32.
    query = model.num_hidden_layers * model.hidden_size * 4
    assert ring.nbytes == (slots * ring.num_kept + 1) * query + 8 * config.scheduler_config.max_num_batched_tokens


def test_random_aborts_lose_no_page(llm: vllm.LLM) -> None:
    report = Soak(llm, seed=1, abort_share=0.7, repeats=4).run(200)
    assert report.aborted > 100
    assert report.finished > 30
    assert report.compactions > 100


def test_a_soak_loses_no_page_and_violates_nothing(llm: vllm.LLM, kind: str) -> None:
    report: Report = Soak(llm, seed=2, repeats=48).run(SOAK_REQUESTS // len(ENGINES))
    print(", ".join(f"{name} {value}" for name, value in asdict(report).items()))
    assert report.requests == report.finished + report.aborted == SOAK_REQUESTS // len(ENGINES)
    assert report.aborted > report.requests / 20
    assert report.compacted_requests > 0.7 * report.evicting_requests
    assert report.compactions > report.requests
    if kind != "recall":  # sentences of prompts are compared there, so they are computed again
        assert report.shared_tokens > 10 * report.requests
    assert report.repeated > 60
    assert (report.steered_tokens > report.requests / 2) == (kind != "gated")
    assert (harness.scheduler_of(llm).eviction.stats._counts.get("probes", 0) > 10) == (kind == "gated")
    assert (report.preemptions > 100) == (kind == "optimistic")
    assert (harness.scheduler_of(llm).eviction.stats._counts.get("recalled_tokens", 0) > 1000) == (kind == "recall")
