"""vLLM's scheduler with eviction under random traffic, without an engine: every token comes from a random generator.

The test counts the orders of each request on its own and compares them with what the client is told.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from skipkv_vllm import bundled_model
from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig
from skipkv_vllm.integration.compat import received_orders
from skipkv_vllm.integration.scheduler import make_scheduler

BLOCK = 16
SMALL = {"kv_budget": 96, "kv_buffer": 32, "kv_check_integrity": True}
UNPROTECTED = SMALL | {"kv_protect_prompt": False, "kv_admission": "optimistic"}
PREFIXES = [[7] * 40, list(range(50, 150)), list(range(200, 230))]


@dataclass
class Counted:
    """The orders of one request, as the workers got them."""

    lives: int = 0
    compactions: int = 0
    evicted_tokens: int = 0


class Driver:
    """A scheduler, its requests, and workers that draw tokens."""

    def __init__(self, policy: dict[str, Any], num_blocks: int, is_async: bool, seed: int, **arguments: Any) -> None:
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.random = random.Random(seed)
        self.config = KVPolicyConfig.parse(policy)
        vllm_config = EngineArgs(
            model=bundled_model(),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=96,
            block_size=BLOCK,
            async_scheduling=is_async,
            num_gpu_blocks_override=num_blocks,
            **arguments,
        ).create_engine_config()
        vllm_config.additional_config = {CONFIG_KEY: self.config.model_dump()}
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        self.scheduler: Any = make_scheduler(
            vllm_config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.num_in_flight = 1 if is_async else 0
        self.numbers = itertools.count()
        self.counted: dict[str, Counted] = {}
        self.in_flight: deque[tuple[SchedulerOutput, list[bool]]] = deque()
        self.num_preempted = self.num_compactions = self.num_finished = 0

    def arrive(self, options: dict[str, Any]) -> None:
        request_id = f"r{next(self.numbers)}"
        prompt = self.random.choice(PREFIXES) + [self.random.randrange(300) for _ in range(self.random.randrange(90))]
        params = SamplingParams(max_tokens=self.random.randrange(1, 300), extra_args=options)
        priority = self.random.randrange(3) if self.scheduler.policy.value == "priority" else 0
        self.scheduler.add_request(
            Request(request_id, prompt, params, None, block_hasher=self.hasher, priority=priority)
        )
        self.counted[request_id] = Counted()

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.num_preempted += len(output.preempted_req_ids or ())
        self._count(output)
        # A chunk that does not end the text samples no token.
        samples = [not self.scheduler.requests[name].is_prefill_chunk for name in output.num_scheduled_tokens]
        self.in_flight.append((output, samples))
        while len(self.in_flight) > self.num_in_flight:
            self._update(*self.in_flight.popleft())

    def _count(self, output: SchedulerOutput) -> None:
        orders = received_orders(output)
        if orders is None:
            return
        for order in orders.compactions:
            counted = self.counted[order.request_id]
            assert (order.ordinal, order.num_evicted_before) == (counted.compactions, counted.evicted_tokens)
            assert order.request_id not in (output.preempted_req_ids or ())
            assert order.num_keep < order.num_resident
            counted.compactions += 1
            counted.evicted_tokens += order.num_resident - order.num_keep
            self.num_compactions += 1
        for start in orders.started:
            self.counted[start.request_id] = Counted(self.counted[start.request_id].lives + 1)
        assert {steered.request_id for steered in orders.steered} <= set(output.num_scheduled_tokens)

    def _update(self, output: SchedulerOutput, samples: list[bool]) -> None:
        ids = list(output.num_scheduled_tokens)
        tokens = [[self.random.choice([5, 9, 13, 220, 271])] if has_sample else [] for has_sample in samples]
        numbers = {request_id: i for i, request_id in enumerate(ids)}
        by_client = self.scheduler.update_from_output(output, ModelRunnerOutput(ids, numbers, tokens))
        for one in (one for outputs in by_client.values() for one in outputs.outputs):
            if one.finish_reason is not None:
                self._finished(one.request_id, one.kv_transfer_params)

    def _finished(self, request_id: str, params: dict[str, Any] | None) -> None:
        counted = self.counted.pop(request_id)
        self.num_finished += 1
        report = (params or {}).get(CONFIG_KEY)
        if counted.lives:
            assert report is not None
            assert {name: report[name] for name in vars(counted)} == vars(counted)
        else:
            # It keeps everything, or ended before it started, or cannot reach its bound.
            assert report is None or report["compactions"] == 0

    def drain(self) -> None:
        """Abort what is left; nothing may be remembered of it."""
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        scheduler.check_integrity()
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not scheduler.eviction.requests
        assert (manager.ledger.num_promised, manager.ledger._num_taken) == (0, 0)
        scheduler.shutdown()


CASES = {
    "bounded": (SMALL | {"kv_policy": "skipkv"}, [{}, {"kv_budget": 64}, {"kv_policy": "full"}], 80, {}),
    "optimistic": (UNPROTECTED | {"kv_policy": "rkv"}, [{}, {"kv_budget": 40}, {"kv_policy": "full"}], 40, {}),
    "priority": (UNPROTECTED | {"kv_policy": "rkv"}, [{}, {"kv_budget": 40}], 40, {"scheduling_policy": "priority"}),
    "accumulation": (SMALL | {"kv_policy": "h2o", "kv_admission": "optimistic"}, [{}, {"kv_policy": "full"}], 40, {}),
    "lookahead": (UNPROTECTED | {"kv_policy": "laq"}, [{}, {"kv_budget": 50}], 40, {}),
}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_random_traffic_leaves_nothing_behind_and_clients_learn_what_was_ordered(case, is_async):
    policy, options, num_blocks, arguments = CASES[case]
    driver = Driver(policy, num_blocks, is_async, seed=3, **arguments)
    for _ in range(800):
        if driver.random.random() < 0.25 and len(driver.scheduler.requests) < 16:
            driver.arrive(dict(driver.random.choice(options)))
        if driver.random.random() < 0.01 and driver.scheduler.requests:
            request_id = driver.random.choice(sorted(driver.scheduler.requests))
            driver.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        driver.step()
    assert driver.num_compactions > 5
    assert driver.num_finished > 2
    assert bool(driver.num_preempted) == (driver.config.kv_admission == "optimistic")
    driver.drain()


def test_a_streaming_session_keeps_everything_and_that_is_counted():
    driver = Driver(SMALL | {"kv_policy": "rkv"}, 80, False, seed=0)
    params = SamplingParams(max_tokens=200)
    session = Request("session", list(range(300)), params, None, block_hasher=driver.hasher, resumable=True)
    driver.counted["session"] = Counted()
    driver.scheduler.add_request(session)
    assert driver.scheduler.eviction.report(())["skipped:streaming_input"] == 1
    for _ in range(40):
        driver.step()
    assert session.num_computed_tokens > 300
    assert driver.num_compactions == 0
    assert driver.scheduler.eviction.requests["session"].demand.num_tokens == 1024
    driver.drain()


def test_a_request_that_outgrows_the_pool_ends_where_the_pool_does():
    driver = Driver(SMALL | {"kv_policy": "rkv"}, 11, False, seed=0)
    params = SamplingParams(max_tokens=1000, extra_args={"kv_policy": "full"})
    driver.scheduler.add_request(Request("long", [1] * 20, params, None, block_hasher=driver.hasher))
    assert driver.scheduler.requests["long"].max_tokens == 140
    driver.drain()
