"""A block manager as the scheduler's side expects it: a free list, reference counts and the promises of a ledger.

A block that a compaction frees is the next one to be taken, so that it changes hands within a step whenever it can.
"""

from __future__ import annotations

from collections import Counter

from skipkv_vllm.core.limits import ceil_div
from skipkv_vllm.scheduler.admission import Holding, Ledger
from skipkv_vllm.scheduler.eviction import CompactedBlocks
from skipkv_vllm.scheduler.planner import PlannedCompaction
from skipkv_vllm.scheduler.requests import RequestRecord


class Blocks:
    """Blocks of running requests.

    Args:
        num_blocks: blocks of the pool; block 0 is given to no request.
        block_size: tokens of a block.
        requests: the scheduler's records.

    Attributes:
        tables: block ids by request.
        handed_over: how many blocks that a compaction freed went to another request in the same step: "moves", as a
            fresh block of another compaction, "tokens", for the tokens of the step.
        num_replaced: shared blocks that compactions replaced.
    """

    def __init__(self, num_blocks: int, block_size: int, requests: dict[str, RequestRecord]) -> None:
        self.block_size = block_size
        self.tables: dict[str, list[int]] = {}
        self.handed_over: Counter[str] = Counter()
        self.num_replaced = 0
        self._requests = requests
        self._ledger = Ledger(num_blocks - 1, block_size, is_bounded=True)
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders: Counter[int] = Counter()
        self._just_freed: dict[int, str] = {}
        """blocks that a compaction of this step freed, and whose they were"""

    # ---- the protocol of the scheduler's side

    @property
    def num_promised(self) -> int:
        """Blocks promised to running requests."""
        return self._ledger.num_promised

    def blocks(self, request_id: str) -> list[int]:
        """Return the block ids of a request."""
        return list(self.tables[request_id])

    def compact(self, request_id: str, plan: PlannedCompaction) -> CompactedBlocks:
        """Shorten a request's table, replace shared blocks that it would write, and free the rest."""
        source, num_target = self.tables[request_id], ceil_div(plan.num_keep, self.block_size)
        target, dropped = source[:num_target], source[num_target:]
        num_intact = plan.protected // self.block_size
        for i in range(num_intact, num_target):
            if self._holders[target[i]] > 1:
                dropped.append(target[i])
                target[i] = self._take(request_id, "moves")
                self.num_replaced += 1
        self.tables[request_id] = target
        self._requests[request_id].num_evicted += plan.num_resident - plan.num_keep
        for block in dropped:
            if self._release(block):
                self._just_freed[block] = request_id
        return CompactedBlocks(source, target)

    def take_lookahead(self, num_tokens: int) -> list[int] | None:
        """Give no lookahead blocks; no policy of the small engine needs any."""
        return None

    def return_lookahead(self) -> None:
        """See `take_lookahead`."""

    def forget(self, request_id: str) -> None:
        """Free the blocks of a request that ended or was preempted, and end the promises to it."""
        record = self._requests[request_id]
        if record.promise is not None:
            for block in self.tables.pop(request_id):
                self._release(block)
            self._ledger.release(record.promise)
            record.promise, record.num_evicted = None, 0

    # ---- the engine

    def begin_step(self) -> None:
        """Forget which blocks the last step freed."""
        self._just_freed.clear()

    def fits(self, request_id: str, shared: list[int]) -> bool:
        """Return whether a request that shares these first blocks can be promised all it may ever need."""
        return self._ledger.fits(self._requests[request_id].demand, shared)

    def admit(self, request_id: str, shared: list[int]) -> None:
        """Give a request its first blocks, which others hold too."""
        record = self._requests[request_id]
        record.promise = self._ledger.admit(record.demand, shared)
        self.tables[request_id] = list(shared)
        self._holders.update(shared)

    def grow(self, request_id: str, num_resident: int) -> None:
        """Take blocks until a request has room for that many tokens."""
        table = self.tables[request_id]
        while len(table) * self.block_size < num_resident:
            table.append(self._take(request_id, "tokens"))

    def check_integrity(self) -> None:
        """Verify that every block is free or held, and that all promises are kept."""
        held = Counter(block for table in self.tables.values() for block in table)
        assert held == +self._holders, "the holders of a block are miscounted"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not held.keys() & set(self._free), "a block is free and in use"
        assert len(held) + len(self._free) == self._ledger.num_blocks, "a block was lost"
        self._ledger.check_integrity(
            Holding(name, record.promise, len(self.tables[name]))
            for name, record in self._requests.items()
            if record.promise is not None
        )

    def _take(self, request_id: str, use: str) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        if self._just_freed.get(block, request_id) != request_id:
            self.handed_over[use] += 1
        return block

    def _release(self, block: int) -> bool:
        """Count one holder less; return whether the block is free now."""
        self._holders[block] -= 1
        if self._holders[block]:
            return False
        self._free.append(block)
        return True
