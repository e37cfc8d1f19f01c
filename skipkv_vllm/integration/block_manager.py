"""The block manager with eviction: it counts resident tokens and frees the blocks that compactions empty."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager, SingleTypeKVCacheManager

from ..core.limits import ceil_div
from ..scheduler.admission import Holding, Ledger
from ..scheduler.eviction import CompactedBlocks
from ..scheduler.planner import PlannedCompaction
from ..scheduler.requests import RequestRecord
from .free_queue import GuardQueue


@functools.cache
def _capped(cls: type) -> type:
    """Return the subclass of a manager of a group that is not compacted; one each.

    vLLM starts a request only if its whole prompt fits, and counts for it the window and as many tokens as may be in
    flight of all requests. A request with a bound never has so many of its own, and the pool may be too small for them.
    """

    def get_num_blocks_to_allocate(
        self: Any, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        if apply_admission_cap:
            num_tokens = min(num_tokens, self.requests[request_id].demand.peaks[self.rank] * self.block_size)
        number: int = cls.get_num_blocks_to_allocate(  # type: ignore[attr-defined]
            self, request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )
        return number

    overrides = {"get_num_blocks_to_allocate": get_num_blocks_to_allocate, "__slots__": ()}
    return type(f"Capped{cls.__name__}", (_discreet(cls),), overrides)


@functools.cache
def _discreet(cls: type) -> type:
    """Return the subclass of a manager that publishes to the prefix cache only what depends on tokens alone; one each.

    From its first compaction on, a request's hidden states depend on what was evicted, so its KV no longer matches its
    token hashes, not even in layers that are not compacted. Neither does the KV of a steered request, from its first
    steered token on.
    """

    def cache_blocks(self: Any, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        record = self.requests[request.request_id]
        if record.num_evicted:
            return
        if record.steering is not None:
            num_tokens = min(num_tokens, record.steering.first)
        cls.cache_blocks(self, request, num_tokens, *args, **kwargs)  # type: ignore[attr-defined]

    # Not a mixin, because an object can only change to a class of the same memory layout.
    return type(f"Discreet{cls.__name__}", (cls,), {"cache_blocks": cache_blocks, "__slots__": ()})


# For the type checker it is the stock manager.
if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager as _Base
else:
    _Base = _discreet(FullAttentionManager)


class EvictingBlockManager(_Base):
    """`FullAttentionManager` in which a request may hold fewer tokens than its logical length.

    One integer per request is enough: a request needs `ceil(tokens / block_size)` blocks less those it has, so vLLM's
    arithmetic stays right when evicted tokens are subtracted. The block table is shortened and never has holes, so
    stock attention kernels read it unchanged.

    A block is written in place only if one request holds it, after its hash is dropped. A shared block is replaced by a
    fresh one. From its first compaction on, a request publishes nothing to the prefix cache, in no group.

    A waiting request gets its first block only if the ledger can promise it all the blocks it may ever need.

    Attributes:
        requests: the records of the scheduler's requests; a request must be there before it asks for blocks.
        ledger: the promises to running requests, in all groups.
    """

    requests: Mapping[str, RequestRecord]
    ledger: Ledger
    _lookahead_blocks: list[KVCacheBlock]
    _others: list[SingleTypeKVCacheManager]

    @classmethod
    def adopt(
        cls,
        managers: Sequence[SingleTypeKVCacheManager],
        evicting: int,
        requests: Mapping[str, RequestRecord],
        ledger: Ledger,
    ) -> EvictingBlockManager:
        """Turn one of an engine's freshly made stock managers into one of these.

        vLLM's factory has no seam that covers every attention backend, so the class of the object is changed. The
        managers of the other groups learn what must not be published, and what a request is promised there.

        Args:
            managers: of all groups.
            evicting: index of the group that is compacted.
            requests: see above.
            ledger: see above.
        """
        manager = managers[evicting]
        assert type(manager) is FullAttentionManager
        assert not manager.req_to_blocks
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.requests, manager.ledger, manager._lookahead_blocks = requests, ledger, []
        manager._others = [other for other in managers if other is not manager]
        for rank, other in enumerate(manager._others):
            # A state takes the same few blocks whatever the length of the prompt.
            derive = _discreet if isinstance(other, MambaManager) else _capped
            other.__class__ = derive(type(other))  # type: ignore[arg-type]
            other.requests, other.rank = requests, rank  # type: ignore[attr-defined]
        return manager

    @property
    def num_promised(self) -> int:
        """Blocks promised to running requests."""
        return self.ledger.num_promised

    def num_evicted(self, request_id: str) -> int:
        """Return how many tokens of a request are no longer held."""
        return self.requests[request_id].num_evicted

    def num_blocks(self, request_id: str) -> int:
        """Return how many blocks a request holds in the group that is compacted."""
        return len(self.req_to_blocks.get(request_id, ()))

    def num_held(self, request_id: str) -> int:
        """Return how many blocks a request holds in all groups."""
        return self.num_blocks(request_id) + sum(self._beside(request_id))

    def blocks(self, request_id: str) -> list[int]:
        """Return the block ids of a request in the group that is compacted."""
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
        request = self.requests[request_id]
        # A request that holds blocks takes none from the prefix cache.
        if request.promise is not None:
            return max(self._num_missing(request, num_tokens), 0)
        cached = [block.block_id for block in new_computed_blocks]
        if not self.ledger.fits(request.demand, cached, needs_row=request.is_managed):
            # That many blocks are never free, so vLLM keeps the request waiting.
            return self.block_pool.num_gpu_blocks
        if apply_admission_cap:
            num_tokens = min(num_tokens, request.demand.num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        request = self.requests[request_id]
        if request.promise is None:
            # The blocks that it has now were found in the prefix cache.
            request.promise = self.ledger.admit(request.demand, self.blocks(request_id), needs_row=request.is_managed)
        elif self._num_missing(request, num_tokens) <= 0:
            return []
        num_evicted = request.num_evicted
        return super().allocate_new_blocks(request_id, num_tokens - num_evicted, num_tokens_main_model - num_evicted)

    def settle(self, request: RequestRecord) -> None:
        """Withdraw the promise of blocks in flight in other groups once a decoding request has given them back."""
        assert request.promise is not None
        if all(map(operator.le, self._beside(request.request_id), request.demand.at_rest)):
            request.promise = self.ledger.settle(request.promise)

    def _beside(self, request_id: str) -> Iterator[int]:
        """Yield how many blocks a request holds in each of the other groups."""
        tables = (manager.req_to_blocks.get(request_id, ()) for manager in self._others)
        return (sum(not block.is_null for block in table) for table in tables)

    def _num_missing(self, request: RequestRecord, num_tokens: int) -> int:
        """Return how many blocks a request lacks for `num_tokens` logical tokens; negative if some are spare."""
        num_blocks = len(self.req_to_blocks[request.request_id])
        return ceil_div(num_tokens - request.num_evicted, self.block_size) - num_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # vLLM calls this when a request finishes, is aborted or is preempted.
        self.forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def forget(self, request_id: str) -> None:
        """End all promises to a request that holds no blocks any more."""
        request = self.requests.get(request_id)
        if request is not None and request.promise is not None:
            self.ledger.release(request.promise)
            request.promise, request.num_evicted, request.num_intact = None, 0, None
            request.num_decoding = 0

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

    # ---- eviction

    def compact(self, request_id: str, plan: PlannedCompaction) -> CompactedBlocks | None:
        """Shorten a request's table to `num_keep` tokens and free the rest; the workers move the survivors.

        Blocks that lie wholly in a protected prompt lose no token. They stay as they are, shared and published.

        Returns:
            The blocks, or None if a shared block must be replaced and none is free. In that case nothing has changed,
            and the caller must free some blocks.
        """
        request, blocks = self.requests[request_id], self.req_to_blocks[request_id]
        num_target = ceil_div(plan.num_keep, self.block_size)
        num_intact = plan.protected // self.block_size
        target, dropped = blocks[:num_target], blocks[num_target:]
        shared = [i for i in range(num_intact, num_target) if target[i].ref_cnt > 1]
        if len(shared) > self.block_pool.get_num_free_blocks():
            return None

        source_blocks = self.blocks(request_id)
        # Fresh blocks are taken before any block is freed, so none of them is still to be read.
        for i, fresh in zip(shared, self.block_pool.get_new_blocks(len(shared)), strict=True):
            dropped.append(target[i])
            target[i] = fresh
        self.block_pool.evict_blocks({b.block_id for b in target[num_intact:] if b.block_hash is not None})
        self.req_to_blocks[request_id] = target
        request.num_evicted += plan.num_resident - plan.num_keep
        request.num_intact = num_intact
        self.num_cached_block[request_id] = len(target)
        self.block_pool.free_blocks(reversed(dropped))
        return CompactedBlocks(source_blocks, [b.block_id for b in target])

    def take_lookahead(self, num_tokens: int) -> list[int] | None:
        """Take free blocks for `num_tokens` tokens, until `return_lookahead`.

        Returns:
            Block ids, or None if too few blocks are free.
        """
        num_blocks = ceil_div(num_tokens, self.block_size)
        if num_blocks > self.block_pool.get_num_free_blocks():
            return None
        blocks = self.block_pool.get_new_blocks(num_blocks)
        self._lookahead_blocks += blocks
        return [block.block_id for block in blocks]

    def return_lookahead(self) -> None:
        """Free all lookahead blocks.

        The workers use them before they do anything else of a step, so the same step may give them to requests.
        """
        self.block_pool.free_blocks(self._lookahead_blocks)
        self._lookahead_blocks = []

    # ---- integrity

    def check_integrity(self) -> None:
        """Verify the bookkeeping of every block.

        Raises:
            AssertionError: a block was lost, is held twice by one request, is free while in use, has a wrong reference
                count, or is published although its content was changed.
        """
        self._check_references()
        holding = {request_id for request_id, blocks in self.req_to_blocks.items() if blocks}
        holdings = [
            Holding(request.request_id, request.promise, self.num_held(request.request_id))
            for request in self.requests.values()
            if request.promise is not None
        ]
        assert holding == {each.request_id for each in holdings}, "blocks are held without a promise, or lost"
        self.ledger.check_integrity(holdings)
        for request in self.requests.values():
            self._check_published(request)

    def _check_references(self) -> None:
        pool: BlockPool = self.block_pool
        num_holders: Counter[int] = Counter()
        for blocks in self.req_to_blocks.values():
            assert not any(block.is_null for block in blocks), "a null block is held in the group that is compacted"
        for manager in (self, *self._others):
            for request_id, blocks in manager.req_to_blocks.items():
                ids = [block.block_id for block in blocks if not block.is_null]
                assert len(set(ids)) == len(ids), f"{request_id} holds a block twice: {ids}"
                assert all(pool.blocks[block.block_id] is block for block in blocks)
                num_holders.update(ids)
        queue = pool.free_block_queue
        free = {block.block_id for block in queue.get_all_free_blocks()}
        if isinstance(queue, GuardQueue):
            queue.check_integrity(free)
        assert len(free) == pool.get_num_free_blocks(), "the free list and its count disagree"
        for block in pool.blocks:
            if block.is_null:
                continue
            held = num_holders[block.block_id]
            assert block.ref_cnt == held, f"block {block.block_id}: {block.ref_cnt} references, {held} holders"
            assert (held == 0) == (block.block_id in free), f"block {block.block_id} is free and in use, or lost"

    def _check_published(self, request: RequestRecord) -> None:
        blocks = self.req_to_blocks.get(request.request_id, [])
        if request.num_intact is not None:
            changed = [block.block_id for block in blocks[request.num_intact :] if block.block_hash is not None]
            assert not changed, f"{request.request_id} changed the published blocks {changed}"
        if request.steering is not None:
            first = request.steering.first // self.block_size
            steered = [block.block_id for block in blocks[first:] if block.block_hash is not None]
            assert not steered, f"{request.request_id} is steered and published the blocks {steered}"
