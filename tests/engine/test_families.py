"""Models whose layers differ: the engine equals the oracle, which evicts in the layers with full attention only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams

from benchmarks.texts import solutions
from tests import harness
from tests.harness import PAGE, Job
from tests.random_models import FAMILIES, model_of, random_model
from tests.real_models import real_model
from tests.reference.comparison import UNPROTECTED, another_question, check
from tests.reference.model import Model
from tests.reference.references import ReferenceCache
from tests.soak import SPECIAL as SPECIAL_SOAK
from tests.soak import Soak

if TYPE_CHECKING:
    import vllm

LONG, NUM_NEW = 150, 310
SIZES: dict[str, Any] = {"kv_budget": 160, "kv_buffer": 48, "kv_request_policies": ["h2o", "random"]}
SPECIAL = [family for family in FAMILIES if FAMILIES[family].is_special]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Module scope, so that pytest runs all tests of an engine in a row."""
    return request.param


@pytest.fixture(scope="module", params=SPECIAL)
def special(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def oracle(family: str) -> ReferenceCache:
    """Return the results of a family's oracle. Most tests run the same requests, so it computes each once."""
    return ReferenceCache(Model(random_model(family)))


def arguments_of(family: str, **arguments: Any) -> dict[str, Any]:
    return SIZES | model_of(family) | arguments


def job_of(family: str, **arguments: Any) -> Job:
    """Five requests, the last of which finds most of the first one's prompt in the prefix cache."""
    prompts = [*harness.demo_prompts(2, at_least=LONG), *harness.demo_prompts(2)]
    methods = ["rkv", "random", "skipkv", "h2o", "skipkv"]
    return Job([*prompts, another_question(prompts[0])], methods, NUM_NEW, 7, arguments_of(family, **arguments))


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_engine_equals_reference(family: str, granularity: str) -> None:
    job = job_of(family, kv_granularity=granularity)
    outcome = harness.run(job)
    assert outcome.num_cached[-1] >= 4 * PAGE, "the prefix cache was not hit"
    check(job, outcome, oracle(family), min_compactions=3)


def test_runner_v2_equals_reference(family: str) -> None:
    job = job_of(family)
    outcome = harness.run(job, "v2")
    assert outcome.is_v2
    assert outcome.num_cached[-1] >= 4 * PAGE, "the prefix cache was not hit"
    check(job, outcome, oracle(family), min_compactions=3)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_equals_stock_without_eviction(special: str, runner: str) -> None:
    prompts, num_new = harness.demo_prompts(4), 100 if runner == "v1" else 20
    model = model_of(special)
    expected = harness.run(Job(prompts, [], num_new, every=5, arguments=model, num_logprobs=5), runner)
    arguments = arguments_of(special, kv_budget=1024)
    job = Job(prompts, ["skipkv", "full"] * 2, num_new, every=5, arguments=arguments, num_logprobs=5)
    outcome = harness.run(job, runner)
    assert not any(len(trace.kept) for trace in outcome.traces)
    assert (outcome.tokens, outcome.logprobs) == (expected.tokens, expected.logprobs)


def test_bounded_admission_never_preempts_where_stock_vllm_does(special: str) -> None:
    job = job_of(special, num_gpu_blocks_override=FAMILIES[special].pool)
    arguments = {"num_gpu_blocks_override": FAMILIES[special].pool, "max_model_len": 1024} | model_of(special)
    stock = harness.run(Job(job.prompts, [], NUM_NEW, 7, arguments))
    assert sum(stock.num_preemptions) > 0, "the pool is too large for this test to show anything"
    outcome = harness.run(job)
    assert sum(outcome.num_preemptions) == 0
    assert max(load.num_running for load in outcome.load) > 3
    check(job, outcome, oracle(special), min_compactions=3)


def blocks_by_length(llm: vllm.LLM, prompt: list[int], num_new: int) -> dict[int, tuple[int, list[int]]]:
    """Run a request alone; return its blocks by its computed tokens: of full attention, and of each other group."""
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SlidingWindowManager

    scheduler, params = harness.scheduler_of(llm), SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    name = llm.llm_engine.add_request("0", {"prompt_token_ids": prompt}, params)
    found: dict[int, tuple[int, list[int]]] = {}
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if not (request := scheduler.requests.get(name)):
            continue
        held: dict[bool, list[int]] = {True: [], False: []}
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            count = sum(not block.is_null for block in manager.req_to_blocks[name])
            held[isinstance(manager, (SlidingWindowManager, MambaManager))].append(count)
        found[request.num_computed_tokens] = sum(held[False]), held[True]
    return found


def check_blocks(prompt: list[int], num_new: int, budget: int, buffer: int, **arguments: Any) -> None:
    """Check that full attention holds no more than the bound, and the other layers what they hold in stock vLLM."""
    stock = blocks_by_length(harness.stock_engine(**arguments), prompt, num_new)
    sizes = SIZES | {"kv_budget": budget, "kv_buffer": buffer, "kv_protect_prompt": False}
    found = blocks_by_length(harness.engine(**sizes, **arguments), prompt, num_new)
    bound = -(-(budget + buffer) // arguments["block_size"])
    assert max(full for full, _ in stock.values()) > 1.1 * bound
    assert max(full for full, _ in found.values()) == bound
    # A prompt ends a step at its bound; so until the second token, the other layers free blocks in other steps.
    written = range(len(prompt) + 2, len(prompt) + num_new - 1)
    assert [found[length][1] for length in written] == [stock[length][1] for length in written]


def test_full_attention_is_bounded_and_the_others_are_as_in_stock_vllm(special: str) -> None:
    check_blocks(harness.demo_prompts(1, at_least=LONG)[0], 200, 96, 32, **model_of(special))


def test_real_weights_with_a_small_budget() -> None:
    from transformers import AutoTokenizer

    folder = str(real_model("gemma3"))
    prompt = AutoTokenizer.from_pretrained(folder).encode(solutions(0))[:700]
    check_blocks(prompt, 100, 512, 128, model=folder, dtype="bfloat16", block_size=PAGE, max_model_len=1024)


def test_a_preempted_request_resumes_to_the_same_tokens(special: str) -> None:
    job = job_of(special, kv_admission="optimistic", num_gpu_blocks_override=FAMILIES[special].small_pool)
    outcome = harness.run(job)
    assert sum(outcome.num_preemptions) > 0, "the pool is too large for this test to show anything"
    check(job, outcome, oracle(special), min_compactions=3)


def test_a_prompt_that_is_not_protected(special: str) -> None:
    """A prompt longer than the bound is compacted while it is computed, and its tail is found in the prefix cache."""
    first, second = harness.demo_prompts(2, at_least=400)
    arguments = arguments_of(special, kv_protect_prompt=False, kv_budget=96, kv_buffer=32)
    job = Job([first, second, another_question(first)], ["rkv", "skipkv", "rkv"], 60, every=9, arguments=arguments)
    outcome = harness.run(job)
    check(job, outcome, oracle(special), min_compactions=8)


def test_a_soak_loses_no_page(special: str) -> None:
    llm = harness.engine(**SPECIAL_SOAK, **model_of(special))
    report = Soak(llm, seed=3, abort_share=0.3, repeats=4).run(150)
    assert report.aborted > 20
    assert report.compactions > 150
    assert report.shared_tokens > 1000


def test_blocks_are_promised_while_the_end_of_a_prompt_is_in_flight(special: str) -> None:
    """With asynchronous scheduling the next token is planned before that end is computed; integrity is checked."""
    llm = harness.engine(**SPECIAL_SOAK, **model_of(special))
    (prompt,) = harness.demo_prompts(1, at_least=160)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, extra_args={"kv_policy": "full"})
    (output,) = llm.generate([{"prompt_token_ids": prompt[:160]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    harness.assert_pool_empty(llm)


def test_states_without_a_prefix_cache() -> None:
    """A request has one state then, in a block that it keeps."""
    job = job_of("qwen3_next", enable_prefix_caching=False)
    outcome = harness.run(job)
    check(job, outcome, oracle("qwen3_next"), min_compactions=3)


def test_a_block_larger_than_the_bound_is_kept() -> None:
    """As in models whose state is as large as the KV of many tokens: eviction works, and frees nothing."""
    job = job_of("qwen3_next", block_size=512)
    outcome = harness.run(job)
    check(job, outcome, oracle("qwen3_next"), min_compactions=3)
    assert {sample.num_pages for sample in outcome.samples} == {1}


@pytest.mark.parametrize(
    "policy",
    [
        ("laq", {}),
        ("thinkv", {"layers": "0,2", "segment": 32, "transition_above": 0.56, "execution_below": 0.54}),
    ],
    ids=["laq", "thinkv"],
)
def test_other_methods_score_latents(policy: tuple[str, dict[str, Any]]) -> None:
    name, parameters = policy
    others = ["finch", "snapkv", "tova", "obcache", "keydiff"]
    arguments = UNPROTECTED | {"kv_policy": name, "kv_policy_config": parameters, "kv_request_policies": others}
    prompts = harness.demo_prompts(6, at_least=LONG)
    job = Job(prompts, [name, *others], 120, every=5, arguments=arguments_of("deepseek_v3", **arguments))
    check(job, harness.run(job), oracle("deepseek_v3"), min_compactions=1)
