"""Property test of the block manager: random traffic against a model of the content of every block."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import (
    make_block_hash_with_group_id,
)

from skipkv_vllm.core.limits import Limits
from skipkv_vllm.integration.block_manager import EvictingBlockManager
from tests.unit.integration.engine import PAGE, Engine
from tests.unit.integration.traffic import TOTALS, apply, arrivals, drive, finish_all, others, steps


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    # The longest request alone always fits into the pool.
    num_pages=st.sampled_from([18, 24, 40]),
    seed=st.integers(0, 2**16),
    caching=st.sampled_from([True, True, True, False]),
    bounded=st.booleans(),
    guarded=st.booleans(),
    windows=st.sampled_from([(), (), (), (6,), (1, 9)]),
    num_states=st.sampled_from([0, 0, 1, 2]),
    operations=st.lists(st.one_of(arrivals, arrivals, steps, steps, steps, others), min_size=20, max_size=50),
)
def run_traffic(num_pages, seed, caching, bounded, guarded, windows, num_states, operations):
    # A group with a window takes what its tokens in flight take, and no more than its window afterwards.
    num_pages += 20 * len(windows) + 8 * num_states
    engine = Engine(num_pages, seed, caching, bounded, guarded, windows, num_states)
    for operation in operations:
        apply(engine, operation)
        engine.check()
    if bounded:
        for count in ("short", "refused", "no_lookahead"):
            assert engine.counts[count] == 0, "a request did not get a promised block"
    finish_all(engine)
    for name, count in engine.counts.items():
        TOTALS[name] = TOTALS.get(name, 0) + count
        if count:
            event(name)


def test_random_traffic_keeps_every_page_right():
    TOTALS.clear()
    run_traffic()
    # The examples must have reached every tested case.
    missing = [name for name, count in TOTALS.items() if count == 0 and name not in ("refused", "no_lookahead")]
    assert not missing, TOTALS


def test_a_prompt_longer_than_the_pool_starts_beside_windows():
    # 4 blocks at its bound, and 4 of the window and 4 in flight; vLLM would wait for the 14 of the whole prompt.
    engine = Engine(num_pages=13, seed=0, is_bounded=True, windows=(9,))
    engine.arrive(list(range(55)), Limits(budget=12, buffer=4, window=2, protected=0))
    drive(engine, 10)
    assert engine.tracked["r0"].request.num_computed_tokens == 16 + 9 * 4
    assert engine.counts["compactions"] == 9
    finish_all(engine)


def test_blocks_of_states_in_flight_are_promised_until_one_state_is_left():
    """A request that holds two states may take a third before it gives the first one back."""
    engine = Engine(num_pages=40, seed=0, is_bounded=True, num_states=1)
    engine.others = engine.others._replace(num_steps=2)
    engine.arrive(list(range(8)), None)
    drive(engine, 2)
    record = engine.requests["r0"]
    assert engine.manager.num_held("r0") - engine.manager.num_blocks("r0") == 2
    engine.manager.settle(record)
    assert record.promise.num_in_flight == 1
    drive(engine, 4)
    assert record.promise.num_in_flight == 0
    finish_all(engine)


def test_two_requests_share_a_prompt_and_both_evict_it():
    engine = Engine(num_pages=40, seed=0)
    prompt = list(range(12))
    for _ in range(2):
        engine.arrive([*prompt, 99], Limits(budget=13, buffer=3, window=2, protected=0))
        drive(engine, 1)
    assert engine.counts["hits"] == 1
    drive(engine, 12)
    assert engine.counts["replaced"] >= 1
    assert engine.counts["compactions"] >= 4
    finish_all(engine)


def test_a_protected_shared_prompt_is_never_replaced():
    engine = Engine(num_pages=40, seed=0)
    for _ in range(3):
        engine.arrive(list(range(12)), Limits(budget=8, buffer=3, window=2, protected=12))
        drive(engine, 1)
    shared = [b.block_id for b in engine.manager.req_to_blocks["r0"][:2]]
    drive(engine, 20)
    assert engine.counts["compactions"] >= 3
    assert engine.counts["replaced"] == 0
    for request_id in ("r0", "r1", "r2"):
        assert [b.block_id for b in engine.manager.req_to_blocks[request_id][:2]] == shared
    finish_all(engine)


def test_a_compaction_that_finds_no_free_page_changes_nothing_and_somebody_is_preempted():
    # 5 usable blocks: r0 and r1 share two prompt blocks, and one block is free when r1 must replace both.
    engine = Engine(num_pages=6, seed=0)
    prompt = list(range(8))
    engine.arrive([*prompt, 50], None)
    drive(engine, 1)
    engine.arrive([*prompt, 60, 61, 62], Limits(budget=8, buffer=4, window=2, protected=0))
    drive(engine, 2)
    assert engine.pool.get_num_free_blocks() == 1
    engine.step(1)
    engine.check()
    assert engine.counts["refused"] == engine.counts["preemptions"] == 1
    assert engine.counts["compactions"] == 0
    assert engine.running == ["r0"]
    finish_all(engine)


def test_a_compacted_request_publishes_nothing_more():
    engine = Engine(num_pages=40, seed=0)
    engine.arrive(list(range(8)), Limits(budget=12, buffer=4, window=2, protected=8))
    drive(engine, 40)
    assert engine.counts["compactions"] >= 3
    hashed = [b for b in engine.manager.req_to_blocks["r0"] if b.block_hash is not None]
    assert len(hashed) == 2, "exactly the intact prompt blocks must be cached"
    # The same text again hits exactly the prompt, and intact blocks that the first compaction freed.
    engine.arrive(list(engine.tracked["r0"].request.all_token_ids), None)
    drive(engine, 2)
    finish_all(engine)


def test_a_preempted_request_starts_over_from_nothing():
    engine = Engine(num_pages=40, seed=0)
    engine.arrive(list(range(8)), Limits(budget=10, buffer=4, window=2, protected=8))
    drive(engine, 12)
    assert engine.manager.num_evicted("r0") > 0
    engine.preempt("r0")
    engine.check()
    assert engine.manager.num_evicted("r0") == 0
    assert engine.pool.get_num_free_blocks() == 39
    drive(engine, 12, chunk=3)
    assert engine.manager.num_evicted("r0") > 0
    finish_all(engine)


@pytest.mark.parametrize("corrupt", ["lost", "twice", "leaked", "stale", "published"])
def test_check_integrity_can_fail(corrupt):
    engine = Engine(num_pages=20, seed=0)
    engine.arrive(list(range(9)), Limits(budget=8, buffer=4, window=2, protected=0))
    drive(engine, 5)
    blocks = engine.manager.req_to_blocks["r0"]
    if corrupt == "lost":
        blocks.pop()
    elif corrupt == "twice":
        blocks.append(blocks[0])
    elif corrupt == "leaked":
        engine.pool.free_block_queue.popleft()
    elif corrupt == "stale":
        engine.arrive(list(range(9)), None)
        engine.requests["r1"].promise = engine.requests["r0"].promise
    else:
        # A block behind a rewritten one can no longer be a prefix.
        assert blocks[0].block_hash is None
        assert engine.manager.num_evicted("r0")
        block_hash = engine.tracked["r0"].request.block_hashes[1]
        engine.pool._insert_block_hash(make_block_hash_with_group_id(block_hash, 0), blocks[1], num_tokens=2 * PAGE)
    with pytest.raises(AssertionError):
        engine.manager.check_integrity()


def test_adopting_a_used_or_foreign_manager_is_refused():
    engine = Engine(num_pages=20, seed=0)
    with pytest.raises(AssertionError):
        EvictingBlockManager.adopt([engine.manager], 0, {}, engine.manager.ledger)
