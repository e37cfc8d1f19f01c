"""Grouping in the real scheduler: requests are admitted by length and in time, and no answer changes."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from skipkv_vllm import bundled_model
from skipkv_vllm.integration.free_queue import GuardQueue
from skipkv_vllm.integration.waiting_queue import PrefillLengthQueue
from tests.harness import assert_pool_empty, demo_prompts, engine, scheduler_of

SHORT, LONG = demo_prompts(8)[:4], demo_prompts(8, at_least=160)[4:]


GROUPING = {"kv_batch_grouping": "prefill-length", "kv_grouping_width": 64, "max_num_seqs": 2, "kv_trace_dir": None}
GUARD = {"kv_prefix_eviction": "guard"}
PROMPTS = [p for pair in zip(SHORT, LONG, strict=True) for p in pair]
BY_LENGTH = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def llm():
    return engine(**GROUPING, **GUARD)


def admissions(llm: Any, queue: Any, prompts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Return the order in which the prompts were admitted, and the answers."""
    scheduler = scheduler_of(llm)
    scheduler.waiting = queue
    params = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True, detokenize=False)
    number = {llm.llm_engine.add_request(f"{i}", {"prompt_token_ids": p}, params): i for i, p in enumerate(prompts)}
    order: list[int] = []
    answers: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        running = [number.get(r.request_id) for r in scheduler.running]
        order += [n for n in running if n is not None and n not in order]
    assert_pool_empty(llm)
    return order, [answers[str(i)] for i in range(len(prompts))]


def test_requests_of_similar_length_run_together_and_answer_the_same(llm):
    assert type(scheduler_of(llm).waiting) is PrefillLengthQueue
    grouped = scheduler_of(llm).waiting
    order, answers = admissions(llm, PrefillLengthQueue(64, 600.0), PROMPTS)
    assert order == BY_LENGTH
    stock_order, stock_answers = admissions(llm, FCFSRequestQueue(), PROMPTS)
    assert stock_order == list(range(8))
    assert answers == stock_answers
    at_once, _ = admissions(llm, PrefillLengthQueue(64, 0.0), PROMPTS)
    assert at_once == stock_order
    scheduler_of(llm).waiting = grouped


def test_the_flag_makes_the_queue(llm):
    queue = scheduler_of(llm).waiting
    assert (queue.width, queue.max_wait, queue.by_priority) == (64, 5.0, False)


def test_the_other_flag_makes_the_queue_of_free_pages(llm):
    """Blocks were evicted from the prefix cache: the pool is smaller than all prompts and answers together."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert type(pool.free_block_queue) is GuardQueue
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
    answers = []
    for _ in range(3):
        # Three rounds of prompts that exceed the pool.
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in demo_prompts(40, at_least=160)], params, use_tqdm=False
        )
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]
    assert pool.free_block_queue._evicted or pool.free_block_queue._guarded
    assert_pool_empty(llm)


def test_a_server_that_only_steers_groups_too():
    vector = f"{bundled_model()}-steering.safetensors"
    only_steers = {"kv_policy": "full", "kv_policy_config": {}, "kv_request_policies": []}
    llm = engine(**GROUPING, **only_steers, kv_steering_vectors={"math": vector}, kv_steering_default="math")
    order, _ = admissions(llm, PrefillLengthQueue(64, 600.0), PROMPTS)
    assert order == BY_LENGTH
