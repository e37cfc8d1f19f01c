"""Guard against a plain version of the published algorithm, and its queue against vLLM's contract."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, FreeKVCacheBlockQueue, make_block_hash_with_group_id

from benchmarks.prefix_eviction import belady, document, pooled
from skipkv_vllm.integration.free_queue import GuardQueue


def guard(trace: list[str], size: int) -> list[bool]:
    """Return which requests hit under Guard on single blocks; the least recently used block counts as the farthest."""
    chance = random.Random(0)
    held: list[str] = []  # least recently used first
    old: list[str] = []
    evicted: set[str] = set()
    guarded: set[str] = set()
    num_wrong, hits = 0, []
    for page in trace:
        hits.append(page in held)
        if page in held:
            held.remove(page)
            forget(old, page)
        elif len(held) == size:
            if not old:
                old, evicted, guarded, num_wrong = list(held), set(), set(), 0
            if num_wrong:
                num_wrong -= 1
                victim = chance.choice(old)
            else:
                while held[0] in guarded and not guarded.issuperset(held):
                    held.append(held.pop(0))
                victim = held[0]
            held.remove(victim)
            forget(old, victim)
            guarded.discard(victim)
            evicted.add(victim)
        held.append(page)
        if page in evicted:
            evicted.discard(page)
            guarded.add(page)
            num_wrong += 1
    return hits


def forget(old: list[str], page: str) -> None:
    """Remove a block and put the last one in its place, for random choice."""
    if page in old:
        place, last = old.index(page), old.pop()
        if last != page:
            old[place] = last


@pytest.mark.parametrize("seed", range(20))
def test_hits_are_those_of_the_algorithm(seed):
    chance = random.Random(seed)
    size, number = chance.randint(3, 12), chance.randint(4, 20)
    trace = [f"{chance.randrange(number)}/0" for _ in range(400)]
    if seed % 2:
        trace = [f"{i % (size + 1)}/0" for i in range(400)]
    share = pooled([[page] for page in trace], size, True)
    assert share == sum(guard(trace, size)) / len(trace)


def test_a_scan_that_lru_misses_all_of_is_partly_found():
    trace = [document(i % 22, 1) for i in range(2000)]
    assert pooled(trace, 20, False) == 0
    assert pooled(trace, 20, True) > 0.4
    assert belady(trace, 20) > pooled(trace, 20, True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**16))
def test_the_pool_stays_sound_whatever_is_asked_of_it(steps, seed):
    chance, pool = random.Random(seed), BlockPool(12, enable_caching=True, hash_block_size=16)
    queue = pool.free_block_queue = GuardQueue.adopt(pool.free_block_queue)
    held = []
    for step in steps:
        if step == 0 and held:
            pool.free_blocks([held.pop(chance.randrange(len(held)))])
        elif step == 1:
            cached = pool.get_cached_block(BlockHash(str(chance.randrange(15)).encode()), [0])
            if cached is not None:
                pool.touch(cached)
                held += cached
        elif step == 2 and held:
            # A compaction does this to a block that it writes.
            pool.evict_blocks({chance.choice(held).block_id})
        elif step == 3 and not held:
            pool.reset_prefix_cache()
        elif pool.get_num_free_blocks():
            (block,) = pool.get_new_blocks(1)
            name = BlockHash(str(chance.randrange(15)).encode())
            if pool.get_cached_block(name, [0]) is None:
                pool._insert_block_hash(make_block_hash_with_group_id(name, 0), block, num_tokens=16)
            held.append(block)
        free = queue.get_all_free_blocks()
        assert len(free) == queue.num_free_blocks == pool.get_num_free_blocks()
        assert len({b.block_id for b in free}) == len(free)
        assert not {b.block_id for b in free} & {b.block_id for b in held}
        queue.check_integrity({b.block_id for b in free})


def test_pages_that_were_old_are_new_when_the_cache_was_reset():
    pool = BlockPool(5, enable_caching=True, hash_block_size=16)
    queue = pool.free_block_queue = GuardQueue.adopt(pool.free_block_queue)
    blocks = pool.get_new_blocks(4)
    for i, block in enumerate(blocks):
        pool._insert_block_hash(make_block_hash_with_group_id(BlockHash(str(i).encode()), 0), block, num_tokens=16)
    pool.free_blocks(blocks)
    pool.free_blocks(pool.get_new_blocks(1))  # a phase begins
    assert len(queue._old) == 3
    assert pool.reset_prefix_cache()
    pool.get_new_blocks(4)
    queue.check_integrity(set())


def test_only_a_stock_queue_is_adopted():
    class Other(FreeKVCacheBlockQueue):
        pass

    with pytest.raises(AssertionError):
        GuardQueue.adopt(Other([]))
