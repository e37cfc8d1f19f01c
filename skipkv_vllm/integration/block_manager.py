"""The block manager of compacted requests: counts resident tokens and gives emptied pages back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ..core.limits import ceil_div
from ..scheduler.admission import Ledger
from ..scheduler.planner import PlannedCompaction
from .free_queue import GuardQueue


class CompactedPages(NamedTuple):
    """Block ids of a request before and after a compaction, and how many pages it gave back."""

    source_blocks: list[int]
    target_blocks: list[int]
    num_freed: int


class EvictingBlockManager(FullAttentionManager):
    """`FullAttentionManager` in which a request may hold fewer tokens than its logical length.

    One integer per request is enough: page need is `ceil(tokens / page)` minus the pages held, so vLLM's
    own arithmetic stays right when evicted tokens are taken off. The table is shortened, never
    punctured, so stock attention kernels read it unchanged.

    A page is written in place only by its sole owner, after its hash is dropped; a shared page is
    replaced by a fresh one. From its first compaction on, a request publishes nothing to the prefix cache.

    A waiting request gets its first page only if the ledger can promise it all the pages it may ever need.
    """

    ledger: Ledger
    _evicted: dict[str, int]
    """by request that holds pages"""
    _num_intact: dict[str, int]
    """leading pages of each compacted request that were never written to"""
    _borrowed: list[KVCacheBlock]
    _private_from: dict[str, int]
    """position from which the tokens of a steered request are computed as no other's"""

    @classmethod
    def adopt(cls, manager: FullAttentionManager, *, is_bounded: bool = True) -> EvictingBlockManager:
        """Turn a freshly made stock manager into one of these.

        Every request must be declared to its ledger before it asks for pages. vLLM's factory has no seam that covers
        every attention backend, so the object's class is changed.
        """
        assert type(manager) is FullAttentionManager
        assert not manager.req_to_blocks
        manager.__class__ = cls
        assert isinstance(manager, cls)
        # One page of the pool is vLLM's placeholder.
        manager.ledger = Ledger(manager.block_pool.num_gpu_blocks - 1, manager.block_size, is_bounded)
        manager._evicted = {}
        manager._num_intact = {}
        manager._borrowed = []
        manager._private_from = {}
        return manager

    def keep_private(self, request_id: str, first: int) -> None:
        """Publish nothing of this request from position `first` on; until `forget`, also after a preemption."""
        self._private_from[request_id] = first

    def forget(self, request_id: str) -> None:
        """This request has ended."""
        self._private_from.pop(request_id, None)

    def num_evicted(self, request_id: str) -> int:
        """Tokens of this request that are no longer held."""
        return self._evicted.get(request_id, 0)

    def num_pages(self, request_id: str) -> int:
        """Pages this request holds."""
        return len(self.req_to_blocks.get(request_id, ()))

    def pages(self, request_id: str) -> list[int]:
        """Block ids of this request."""
        return [block.block_id for block in self.req_to_blocks[request_id]]

    # ---- vLLM's interface, on resident instead of logical lengths

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        # Nothing of a request that holds pages is found in the prefix cache.
        if request_id in self._evicted:
            return max(self._num_missing(request_id, num_tokens), 0)
        if not self.ledger.fits(request_id, [block.block_id for block in new_computed_blocks]):
            return self.block_pool.num_gpu_blocks  # never free all at once, so vLLM lets the request wait
        if apply_admission_cap:
            num_tokens = min(num_tokens, self.ledger.demand(request_id).num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        evicted = self._evicted.get(request_id)
        if evicted is None:
            # What it holds by now was found in the prefix cache.
            self.ledger.admit(request_id, self.pages(request_id))
            evicted = self._evicted[request_id] = 0
        elif self._num_missing(request_id, num_tokens) <= 0:
            return []
        return super().allocate_new_blocks(request_id, num_tokens - evicted, num_tokens_main_model - evicted)

    def _num_missing(self, request_id: str, num_tokens: int) -> int:
        """Pages that a request with pages lacks to hold `num_tokens` logical tokens; negative where some are spare."""
        pages = len(self.req_to_blocks[request_id])
        return ceil_div(num_tokens - self._evicted[request_id], self.block_size) - pages

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # What a compacted request holds no longer matches the hashes of its tokens.
        if not self._evicted.get(request.request_id):
            # Nor does what a steered one holds, from the first steered token on.
            num_tokens = min(num_tokens, self._private_from.get(request.request_id, num_tokens))
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all come this way.
        self._evicted.pop(request_id, None)
        self._num_intact.pop(request_id, None)
        self.ledger.release(request_id)
        return super().pop_blocks_for_free(request_id)

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

    # ---- eviction

    def compact(self, plan: PlannedCompaction) -> CompactedPages | None:
        """Shorten a request's table to `num_keep` tokens and free the rest; the worker moves the survivors.

        Pages that lie wholly in a protected prompt lose no token, so they stay as they are, shared and
        published.

        Returns:
            The pages, or None when a shared page must be replaced and none is free; nothing has changed
            then, and the caller must free some.
        """
        blocks = self.req_to_blocks[plan.request_id]
        num_target = ceil_div(plan.num_keep, self.block_size)
        num_intact = plan.protected // self.block_size
        target, dropped = blocks[:num_target], blocks[num_target:]
        shared = [i for i in range(num_intact, num_target) if target[i].ref_cnt > 1]
        if len(shared) > self.block_pool.get_num_free_blocks():
            return None

        source_blocks = self.pages(plan.request_id)
        # Fresh pages come before any page is freed, so none of them is one that is still to be read.
        for i, fresh in zip(shared, self.block_pool.get_new_blocks(len(shared)), strict=True):
            dropped.append(target[i])
            target[i] = fresh
        self.block_pool.evict_blocks({b.block_id for b in target[num_intact:] if b.block_hash is not None})
        self.req_to_blocks[plan.request_id] = target
        self._evicted[plan.request_id] = self.num_evicted(plan.request_id) + plan.num_resident - plan.num_keep
        self._num_intact[plan.request_id] = num_intact
        self.num_cached_block[plan.request_id] = len(target)
        self.block_pool.free_blocks(reversed(dropped))
        return CompactedPages(source_blocks, [b.block_id for b in target], len(blocks) - num_target)

    def borrow(self, num_tokens: int) -> list[int] | None:
        """Pages that nobody holds, for that many tokens, until `give_back`.

        Returns:
            Block ids, or None where not enough are free.
        """
        num_pages = ceil_div(num_tokens, self.block_size)
        if num_pages > self.block_pool.get_num_free_blocks():
            return None
        blocks = self.block_pool.get_new_blocks(num_pages)
        self._borrowed += blocks
        return [block.block_id for block in blocks]

    def give_back(self) -> None:
        """Free all pages that were borrowed. The workers use them before they do anything else of a step, so the very
        step that borrows them may give them to requests."""
        self.block_pool.free_blocks(self._borrowed)
        self._borrowed = []

    def check_integrity(self) -> None:
        """Verify every page's bookkeeping.

        Raises:
            AssertionError: a page was lost, is held twice by one request, is free while in use, has a
                wrong reference count, or is published although its content was changed.
        """
        pool: BlockPool = self.block_pool
        holders: dict[int, int] = {}
        for request_id, blocks in self.req_to_blocks.items():
            ids = [block.block_id for block in blocks]
            assert len(set(ids)) == len(ids), f"{request_id} holds a page twice: {ids}"
            for block in blocks:
                assert not block.is_null, f"{request_id} holds the null page"
                assert pool.blocks[block.block_id] is block
                holders[block.block_id] = holders.get(block.block_id, 0) + 1
        queue = pool.free_block_queue
        free = {block.block_id for block in queue.get_all_free_blocks()}
        if isinstance(queue, GuardQueue):
            queue.check_integrity(free)
        assert len(free) == pool.get_num_free_blocks(), "the free list and its count disagree"
        for block in pool.blocks:
            if block.is_null:
                continue
            held = holders.get(block.block_id, 0)
            assert block.ref_cnt == held, f"page {block.block_id}: {block.ref_cnt} references, {held} holders"
            assert (held == 0) == (block.block_id in free), f"page {block.block_id} is free and in use, or lost"
        self.ledger.check_integrity({r: len(self.req_to_blocks.get(r, ())) for r in self._evicted})
        holding = {request_id for request_id, blocks in self.req_to_blocks.items() if blocks}
        assert holding == self._evicted.keys(), "pages are held without being counted, or counted without being held"
        for request_id in self._num_intact:
            changed = self.req_to_blocks[request_id][self._num_intact[request_id] :]
            published = [block.block_id for block in changed if block.block_hash is not None]
            assert not published, f"{request_id} changed the published pages {published}"
        for request_id, first in self._private_from.items():
            steered = self.req_to_blocks.get(request_id, [])[first // self.block_size :]
            published = [block.block_id for block in steered if block.block_hash is not None]
            assert not published, f"{request_id} is steered and published the pages {published}"
