"""Guard (Chen et al., arXiv 2507.16242, NeurIPS 2025) instead of LRU for the choice of the cached block to replace.

LRU fails on repeated scans: with one block too few it evicts each block right before it is needed. Guard follows a
predictor, here the order of LRU, and stops trusting it after a mistake. A block that comes back within a phase is
guarded for the rest of the phase, and a random old block is evicted instead. If the predictor is right, nothing
changes. If it is wrong, the expected number of misses stays within a factor of `2 H + 2` of the optimum, where H is the
harmonic number of the pool's size.
"""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class GuardQueue(FreeKVCacheBlockQueue):
    """vLLM's queue of free blocks, with Guard's order among the cached ones. Blocks that are not cached go first.

    A phase ends when every block that was cached at its beginning has been requested or evicted. The state is that of
    the published algorithm with one block as the unit. So a random victim may lie in the middle of a prefix, and the
    blocks behind it cannot be found until it is computed again.
    """

    _evicted: set[Any]
    """hashes that were evicted in this phase"""
    _guarded: set[int]
    """ids of blocks that came back in this phase"""
    _old: list[KVCacheBlock]
    """free blocks that were cached at the beginning of the phase and have not been requested since"""
    _place: dict[int, int]
    """block id -> index in `_old`"""
    _num_wrong: int
    """wrong evictions for which no random block was evicted yet"""
    _random: random.Random

    @classmethod
    def adopt(cls, queue: FreeKVCacheBlockQueue, seed: int = 0) -> GuardQueue:
        """Turn a freshly made stock queue into one of these.

        vLLM's pool has no seam for its queue, so the class of the object is changed.
        """
        assert type(queue) is FreeKVCacheBlockQueue
        queue.__class__ = cls
        assert isinstance(queue, cls)
        queue._random = random.Random(seed)
        queue._begin_phase()
        return queue

    # ---- vLLM's interface

    def popleft(self) -> KVCacheBlock:
        first = self.fake_free_list_head.next_free_block
        if first is None or first.block_hash is None:
            block = super().popleft()
            self._forget(block)  # after a reset of the whole cache, old blocks have no hashes
            return block
        victim = self._victim(first)
        self._forget(victim)
        self._guarded.discard(victim.block_id)
        self._evicted.add(victim.block_hash)
        super().remove(victim)
        return victim

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert self.num_free_blocks >= n
        return [self.popleft() for _ in range(n)]

    def remove(self, block: KVCacheBlock) -> None:
        # A request found the block in the prefix cache.
        self._forget(block)
        super().remove(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n(blocks)
        for block in blocks:
            if block.block_hash in self._evicted:
                self._evicted.discard(block.block_hash)
                self._guarded.add(block.block_id)
                self._num_wrong += 1

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        super().prepend_n(blocks)
        # These blocks are not cached, so no request can find them.
        self._guarded.difference_update(block.block_id for block in blocks)

    # ---- the method

    def _victim(self, first: KVCacheBlock) -> KVCacheBlock:
        """Return the cached block to evict; `first` is the head of the queue."""
        if not self._old:
            self._begin_phase()
        if self._num_wrong:
            self._num_wrong -= 1
            return self._random.choice(self._old)
        for _ in range(self.num_free_blocks):
            head = self.fake_free_list_head.next_free_block
            assert head is not None
            if head.block_id not in self._guarded:
                return head
            # Move it to the end, so that the next search does not meet it at once.
            super().remove(head)
            super().append(head)
        return first  # every block is guarded

    def _begin_phase(self) -> None:
        self._evicted, self._guarded, self._num_wrong = set(), set(), 0
        self._old = [block for block in self.get_all_free_blocks() if block.block_hash is not None]
        self._place = {block.block_id: i for i, block in enumerate(self._old)}

    def _forget(self, block: KVCacheBlock) -> None:
        """Note that a block is no longer old."""
        place = self._place.pop(block.block_id, None)
        if place is not None:
            last = self._old.pop()
            if last is not block:
                self._old[place] = last
                self._place[last.block_id] = place

    def check_integrity(self, free: Set[int]) -> None:
        """Verify the state against the ids of the free blocks.

        Raises:
            AssertionError: an old block is not free, or is not found at its place.
        """
        assert len(self._place) == len(self._old), "an old block is lost"
        for block in self._old:
            assert self._old[self._place[block.block_id]] is block, f"block {block.block_id} is misplaced"
            assert block.block_id in free, f"block {block.block_id} is old and in use"
