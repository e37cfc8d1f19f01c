"""Admission, preemption and prefix caching on the real engine; each answer equals the oracle's."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import harness
from tests.harness import PAGE, Job, Sample
from tests.reference.comparison import check

if TYPE_CHECKING:
    import vllm
    from vllm import RequestOutput

    from skipkv_vllm.trace.files import Trace
    from tests.reference.references import ReferenceCache

# 39 usable blocks; a request at the server's bound takes 4, one that keeps everything up to 64.
POOL = 40
SMALL = {"kv_budget": 96, "kv_buffer": 32, "num_gpu_blocks_override": POOL}
CROWD = 14
NUM_NEW = 400


def test_bounded_admission_never_preempts_where_stock_vllm_does(references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(CROWD)
    # Stock vLLM starts only if a sequence of `max_model_len` fits.
    stock = harness.run(Job(prompts, [], NUM_NEW, 1, {"num_gpu_blocks_override": POOL, "max_model_len": 1024}))
    assert sum(stock.num_preemptions) > 0, "the pool is too large for this test to show anything"
    job = Job(prompts, ["skipkv", "rkv"] * (CROWD // 2), NUM_NEW, 1, SMALL)

    outcome = harness.run(job)

    assert outcome.num_preemptions == [0] * CROWD
    most = (POOL - 1) // 4
    reached = next(i for i, load in enumerate(outcome.load) if load.num_running == most)
    crowded = [load.num_running for load in outcome.load[reached:] if load.num_waiting]
    assert len(crowded) > NUM_NEW // 2
    # A row that is released in one step is filled in the next.
    assert set(crowded) == {most}
    assert max(load.num_pages for load in outcome.load) > (POOL - 1) * 0.9
    check(job, outcome, references, min_compactions=9)


def test_every_request_counts_with_what_it_may_hold(references: ReferenceCache) -> None:
    """Requests with their own budgets, without eviction and with a long prompt run side by side."""
    prompts = [*harness.demo_prompts(6), *harness.demo_prompts(1, at_least=250)]
    policies = ["full", "skipkv", "full", "rkv", "skipkv", "streaming_llm", "rkv"]
    budgets = [None, 200, None, None, 160, None, None]
    job = Job(prompts, policies, 300, 2, SMALL, budgets=budgets)

    outcome = harness.run(job)

    assert outcome.num_preemptions == [0] * len(prompts)
    # 11 blocks hold all of 351 tokens; the others take 8, 4, 6, 4 and, for the long prompt, more than 9.
    alone = [s for s in outcome.samples if s.request == 2 and s.num_logical > 340]
    assert max(s.num_pages for s in alone) == 11
    assert outcome.skipped == {"prompt_exceeds_budget": 1}
    check(job, outcome, references, min_compactions=1)


@pytest.mark.parametrize(
    ("options", "num_prompt", "max_tokens", "message"),
    [
        ({"kv_policy": "full"}, 48, 1300, r"prompt of 48 \+ max_tokens=1300\); set max_tokens to at most 1200"),
        ({"kv_policy": "full"}, 1400, 10, "shorten the prompt, or use kv_policy='skipkv'"),
        ({"kv_budget": 1500}, 48, 1900, r"kv_budget=1500\); set kv_budget to at most 1216"),
        ({}, 1300, 700, "protected and raises its bound to 1340.*at most 1208 tokens"),
    ],
)
def test_a_request_that_could_never_be_finished_is_refused(options, num_prompt, max_tokens, message) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = harness.engine(**SMALL)
    params = SamplingParams(max_tokens=max_tokens, extra_args=options)
    with pytest.raises(VLLMValidationError, match=message) as refused:
        llm.generate({"prompt_token_ids": [5] * num_prompt}, params, use_tqdm=False)
    assert "the KV cache holds only 1248" in str(refused.value)
    # A request that fits is served, and the engine's state is in order.
    params = SamplingParams(max_tokens=4, extra_args=options if "kv_budget" not in options else None)
    (output,) = llm.generate({"prompt_token_ids": [5] * 48}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 4
    harness.assert_pool_empty(llm)


def test_errors_offline_name_what_the_caller_wrote() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = harness.engine(**SMALL)
    for tokens, options, parameter in (
        (4, {"kv_budget": 3}, "SamplingParams.extra_args"),
        (4, {"skipkv": {"kv_budget": 64}}, "SamplingParams.extra_args"),
        (1300, {"kv_policy": "full"}, "SamplingParams.max_tokens"),
    ):
        params = SamplingParams(max_tokens=tokens, extra_args=options)
        with pytest.raises(VLLMValidationError, match=rf"\(parameter={parameter}\)$"):
            llm.generate({"prompt_token_ids": [5] * 48}, params, use_tqdm=False)


def test_beam_search_offline_is_refused() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    llm = harness.engine(**SMALL)
    with pytest.raises(VLLMValidationError, match=r"does not support beam search.*LLM\.generate takes the options"):
        llm.beam_search([{"prompt_token_ids": [5] * 48}], BeamSearchParams(beam_width=2, max_tokens=4))
    harness.assert_pool_empty(llm)


def test_a_request_that_slips_through_ends_where_the_pool_does(monkeypatch) -> None:
    """With data parallelism, the API server knows only the average size of the pools."""
    from vllm import SamplingParams

    llm = harness.engine(**SMALL)
    monkeypatch.setattr(llm.llm_engine.vllm_config.cache_config, "num_gpu_blocks", 4 * POOL)
    params = SamplingParams(max_tokens=1300, ignore_eos=True, extra_args={"kv_policy": "full"})
    (output,) = llm.generate({"prompt_token_ids": [5] * 48}, params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 1200
    harness.assert_pool_empty(llm)


def test_a_conversation_hits_the_prefix_cache_after_its_first_turn_was_evicted(references: ReferenceCache) -> None:
    (first,) = harness.demo_prompts(1, at_least=4 * PAGE)
    turn = Job([first], ["skipkv"], 300, 1, SMALL)
    said = harness.run(turn)
    check(turn, said, references, min_compactions=3)

    # The pool keeps its cached blocks between the turns, unlike between jobs.
    text = first + said.tokens[0]
    again = text + harness.chat_prompt("And what was the first value?")
    llm = harness.engine(reset=False, **SMALL)
    outcome = harness.run_on(llm, Job([again], ["skipkv"], 150, 1, SMALL))

    # The whole blocks of the first prompt are cached, but none of the answer, whose blocks were rewritten.
    assert outcome.num_cached == [len(first) // PAGE * PAGE]
    check(Job([again], ["skipkv"], 150, 1, SMALL), outcome, references, min_compactions=2)


# ---- what a response reports


def counted(llm: vllm.LLM) -> Counter[str]:
    """Take the counters of the server; nothing else reads them from these engines."""
    return Counter({name: int(n) for name, n in harness.scheduler_of(llm).eviction.stats._counts.items()})


def generate_and_count(llm: vllm.LLM, prompt: list[int], **params: Any) -> tuple[RequestOutput, dict[str, int]]:
    """Return an answer, and by how much its counters changed meanwhile."""
    from vllm import SamplingParams

    before = counted(llm)
    params = {"max_tokens": 200, "temperature": 0.0, "ignore_eos": True} | params
    # vLLM compiles a helper for sampling even if the model runs eagerly.
    with torch.compiler.set_stance("force_eager"):
        (output,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(**params), use_tqdm=False)
    moved = counted(llm) - before
    return output, {name: moved[name] for name in ("compactions", "evicted_tokens")}


def test_several_choices_are_summed() -> None:
    (prompt,) = harness.demo_prompts(1)
    output, moved = generate_and_count(harness.engine(**SMALL), prompt, n=4, temperature=1.0, seed=3)
    assert moved["compactions"] >= 4 * 3
    assert output.kv_transfer_params == {"skipkv": {"policy": "skipkv", **moved, "lives": 4, "choices": 4}}


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_string_hides_nothing(n) -> None:
    llm = harness.engine(**SMALL)
    (prompt,) = harness.demo_prompts(1)
    full, _ = generate_and_count(llm, prompt)
    text = full.outputs[0].text
    # The longest common beginning that ends with a new token.
    end = max(i for i in range(6, len(text)) if text.index(text[i - 6 : i]) == i - 6)
    # vLLM requires a temperature for several choices; this one still picks the best token.
    output, moved = generate_and_count(llm, prompt, n=n, temperature=1.0, top_k=1, stop=[text[end - 6 : end]])
    assert output.outputs[0].finish_reason == "stop"
    assert moved["compactions"] >= 2 * n
    several = {"choices": n} if n > 1 else {}
    assert output.kv_transfer_params == {"skipkv": {"policy": "skipkv", **moved, "lives": n} | several}


# ---- forced preemption

TINY = {"kv_budget": 96, "kv_buffer": 32, "kv_admission": "optimistic", "num_gpu_blocks_override": 15}


def test_a_preempted_request_resumes_within_its_bound(references: ReferenceCache) -> None:
    """The first request grows until the others lose their blocks, one after the other, and start over."""
    prompts = harness.demo_prompts(5)
    policies = ["full", "skipkv", "h2o", "rkv", "skipkv"]
    job = Job(prompts, policies, 330, 2, TINY)

    outcome = harness.run(job)

    assert outcome.num_preemptions[0] == 0
    assert sum(outcome.num_preemptions) > 3
    again = [s for s in outcome.samples if s.request and s.num_evicted and _is_replayed(s, outcome.samples)]
    assert {s.request for s in again} >= {1, 2}, "too few requests had been compacted when they were preempted"
    # A text longer than the bound is computed again; `check` compares every step with the bound.
    assert max(s.num_logical for s in again) > 1.5 * (96 + 32)
    assert outcome.skipped == {}
    check(job, outcome, references, min_compactions=5)
    for number, policy in enumerate(policies[1:], 1):
        num_preemptions, trace = outcome.num_preemptions[number], outcome.traces[number]
        assert outcome.reports[number] == {"policy": policy, **last_life(trace), "lives": num_preemptions + 1}


def last_life(trace: Trace) -> dict[str, int]:
    is_last = trace.life == trace.life[-1]
    kept = [positions.shape[2] for positions, last in zip(trace.kept, is_last.tolist(), strict=True) if last]
    return {"compactions": len(kept), "evicted_tokens": int(trace.resident_before[is_last].sum()) - sum(kept)}


def test_a_request_that_was_cleared_reports_its_last_life() -> None:
    from vllm import SamplingParams

    llm = harness.engine(**TINY)
    (prompt,) = harness.demo_prompts(1)
    reports, work = [], []
    for clear_at in (None, 150):
        params = SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True)
        llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, params)
        outputs, before = [], counted(llm)
        while llm.llm_engine.has_unfinished_requests():
            outputs += llm.llm_engine.step()
            if len(outputs) == clear_at:
                assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
                clear_at = None
        reports.append(outputs[-1].kv_transfer_params["skipkv"])
        # The counters describe the work of the server, so a preemption takes nothing back.
        work.append((counted(llm) - before)["compactions"])
    assert work[1] > work[0] == reports[0]["compactions"] >= 4
    assert reports[1] == reports[0] | {"lives": 2}


def _is_replayed(sample: Sample, samples: list[Sample]) -> bool:
    """Return whether the request had already computed this many tokens."""
    return any(
        s.request == sample.request and s.step < sample.step and s.num_logical > sample.num_logical for s in samples
    )
