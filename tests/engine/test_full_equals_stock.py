"""Without eviction, the engine equals vLLM to the last bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from skipkv_vllm.integration.compat import request_checks
from tests import harness
from tests.harness import Job, Outcome

# Model Runner V2 runs in Triton's interpreter here, which is slow.
NUM_NEW = {"v1": 150, "v2": 20}
NUM_PROMPTS = {"v1": 8, "v2": 4}


def job(runner: str, policies: tuple[str, ...], arguments: dict[str, Any]) -> Job:
    """Return the same requests in the same order of arrival for any engine; `policies` alternate."""
    prompts = harness.demo_prompts(NUM_PROMPTS[runner])
    turns = [policies[i % len(policies)] for i in range(len(prompts))] if policies else []
    return Job(prompts, turns, NUM_NEW[runner], every=5, arguments=arguments, num_logprobs=5)


@functools.cache
def stock(runner: str) -> Outcome:
    """Outcome of vLLM without the package."""
    return harness.run(job(runner, (), {}), runner)


def test_an_engine_without_a_policy_still_searches_by_beams() -> None:
    from vllm.sampling_params import BeamSearchParams

    request_checks._install_beam_search_check()
    (prompt,) = harness.demo_prompts(1)
    llm = harness.stock_engine()
    (found,) = llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=4))
    assert [len(beam.tokens) for beam in found.sequences] == [len(prompt) + 4] * 2


@pytest.mark.parametrize(
    ("runner", "policies", "arguments"),
    [
        pytest.param("v1", ("skipkv",), {"kv_budget": 1024}, id="v1-budget-not-reached"),
        pytest.param("v1", ("full",), {}, id="v1-full-on-active-server"),
        pytest.param("v2", ("skipkv", "full"), {"kv_budget": 1024}, id="v2-both"),
    ],
)
def test_equals_stock(runner: str, policies: tuple[str, ...], arguments: dict[str, Any]) -> None:
    expected = stock(runner)

    outcome = harness.run(job(runner, policies, arguments), runner)

    assert outcome.is_v2 == expected.is_v2 == (runner == "v2")
    assert not any(len(trace.kept) for trace in outcome.traces)
    assert not any(sample.num_evicted for sample in outcome.samples)
    assert outcome.tokens == expected.tokens
    assert all(len(tokens) == NUM_NEW[runner] for tokens in outcome.tokens)
    assert all(len(logprobs) == NUM_NEW[runner] for logprobs in outcome.logprobs)
    assert outcome.logprobs == expected.logprobs
