"""Which cached page gives way to a new one: Guard (Chen et al., arXiv 2507.16242, NeurIPS 2025) instead of LRU.

LRU fails on repeated scans: with one page too few it evicts each page right before it is asked for. Guard follows a
predictor, here LRU's own order, and stops trusting it where it was wrong: a page that comes back within a phase is
guarded for the rest of the phase, and a random old page goes in its stead. Where the predictor is right nothing
changes; where it is wrong the expected number of misses stays within a factor `2 H + 2` of the best possible one, H the
harmonic number of the pool's size.
"""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class GuardQueue(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, with Guard's order among the cached ones. Pages that nobody can find go first.

    A phase begins when every page that was cached at its beginning has been asked for or evicted. The state is that of
    the published algorithm with one page as the unit: a random victim may lie in the middle of a prefix, and what
    follows it cannot be found until it is computed again.
    """

    _evicted: set[Any]
    """hashes evicted in this phase"""
    _guarded: set[int]
    """block ids of pages that came back in this phase"""
    _old: list[KVCacheBlock]
    """cached at the beginning of the phase, free, and not asked for since"""
    _place: dict[int, int]
    """block id -> index in `_old`"""
    _num_wrong: int
    """evictions that proved wrong and for which no random page has gone yet"""
    _random: random.Random

    @classmethod
    def adopt(cls, queue: FreeKVCacheBlockQueue, seed: int = 0) -> GuardQueue:
        """Turn a freshly made stock queue into one of these; vLLM's pool has no seam for its queue."""
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
            self._forget(block)  # where the whole cache was reset, old pages have lost their hashes
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
        # The page was found: somebody asked for it.
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
        # They hold nothing that could be asked for.
        self._guarded.difference_update(block.block_id for block in blocks)

    # ---- the method

    def _victim(self, first: KVCacheBlock) -> KVCacheBlock:
        """The cached page to evict; `first` is the head of the queue."""
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
            # Out of the way, so that it is not looked at again soon.
            super().remove(head)
            super().append(head)
        return first  # all are guarded

    def _begin_phase(self) -> None:
        self._evicted, self._guarded, self._num_wrong = set(), set(), 0
        self._old = [block for block in self.get_all_free_blocks() if block.block_hash is not None]
        self._place = {block.block_id: i for i, block in enumerate(self._old)}

    def _forget(self, block: KVCacheBlock) -> None:
        """The page is no longer old."""
        place = self._place.pop(block.block_id, None)
        if place is not None:
            last = self._old.pop()
            if last is not block:
                self._old[place] = last
                self._place[last.block_id] = place

    def check_integrity(self, free: Set[int]) -> None:
        """Verify the state against the block ids of the free pages.

        Raises:
            AssertionError: an old page is not free, or is not found where it should be.
        """
        assert len(self._place) == len(self._old), "an old page is lost"
        for block in self._old:
            assert self._old[self._place[block.block_id]] is block, f"page {block.block_id} is misplaced"
            assert block.block_id in free, f"page {block.block_id} is old and in use"
