"""The blocks promised to running requests: counts only, no vLLM, no tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.limits import Demand


class Promise(NamedTuple):
    """The blocks that a request may come to hold.

    Attributes:
        num_own: number of blocks promised to this request alone, without those in flight.
        shared: block ids of its protected prompt that it found in the prefix cache.
        has_row: whether it has a row of the workers' state.
        num_in_flight: blocks promised until its prompt is computed, see `Ledger.settle`.
    """

    num_own: int
    shared: Sequence[int]
    has_row: bool = True
    num_in_flight: int = 0


class Holding(NamedTuple):
    """The promise to a running request and the blocks it holds, for `Ledger.check_integrity`."""

    request_id: str
    promise: Promise
    num_blocks: int


@dataclass
class Ledger:
    """Promises blocks to requests, so that a running request always finds the block it needs.

    A request is promised every block it may ever hold. Blocks of its protected prompt that it finds in the prefix
    cache are never replaced, so all requests that hold such a block share one promise. A compaction may have to replace
    other cached blocks by fresh ones, so these count for each request: a block with two holders is promised twice, and
    the fresh block is there when it is needed.

    Attributes:
        num_blocks: blocks of the pool that requests can use.
        block_size: tokens of a block of the group that is compacted.
        is_bounded: False promises blocks even if the pool has too few.
        num_rows: rows of the workers' state.
        num_promised: blocks promised to running requests.
    """

    num_blocks: int
    block_size: int
    is_bounded: bool
    num_rows: int = sys.maxsize
    num_promised: int = 0
    _num_taken: int = 0
    """rows"""
    _num_holders: dict[int, int] = field(default_factory=dict)
    """by block id, for shared blocks"""

    def fits(self, demand: Demand, cached: Sequence[int], *, needs_row: bool = True) -> bool:
        """Return whether a waiting request can be promised its blocks, and a row if it needs one.

        Args:
            demand: the most that the request may need.
            cached: blocks that it found in the prefix cache, its first ones.
            needs_row: whether it may be compacted.
        """
        if needs_row and self._num_taken >= self.num_rows:
            return False
        if not self.is_bounded:
            return True
        num_own, shared, _, num_in_flight = self._split(demand, cached, needs_row)
        # Look blocks up only if the sum without them fits already.
        room = self.num_blocks - self.num_promised - num_own - num_in_flight
        return room >= len(shared) or (room >= 0 and room >= sum(block not in self._num_holders for block in shared))

    def admit(self, demand: Demand, cached: Sequence[int], *, needs_row: bool = True) -> Promise:
        """Promise a request its blocks and a row; see `fits`."""
        promise = self._split(demand, cached, needs_row)
        self._num_taken += needs_row
        self.num_promised += promise.num_own + promise.num_in_flight
        for block in promise.shared:
            num_holders = self._num_holders.get(block, 0)
            self._num_holders[block] = num_holders + 1
            self.num_promised += not num_holders
        return promise

    def release(self, promise: Promise) -> None:
        """End the promise to a request that gave its blocks back."""
        self._num_taken -= promise.has_row
        self.num_promised -= promise.num_own + promise.num_in_flight
        for block in promise.shared:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                del self._num_holders[block]
                self.num_promised -= 1

    def settle(self, promise: Promise) -> Promise:
        """Withdraw the blocks in flight from a promise, because the request's prompt is computed."""
        self.num_promised -= promise.num_in_flight
        return promise._replace(num_in_flight=0)

    def _split(self, demand: Demand, cached: Sequence[int], needs_row: bool) -> Promise:
        shared = cached[: demand.num_intact]
        return Promise(demand.num_blocks(self.block_size) - len(shared), shared, needs_row, demand.num_in_flight)

    def check_integrity(self, holdings: Iterable[Holding]) -> None:
        """Verify the promises against the running requests.

        Raises:
            AssertionError: the sums are wrong, more blocks are promised than there are, or a request holds more blocks
                than it was promised.
        """
        holdings = list(holdings)
        shared = {block for holding in holdings for block in holding.promise.shared}
        num_own = sum(holding.promise.num_own + holding.promise.num_in_flight for holding in holdings)
        assert shared == self._num_holders.keys(), "blocks are shared without a promise, or promised to no request"
        assert self.num_promised == num_own + len(shared), "the promises do not add up"
        num_taken = sum(holding.promise.has_row for holding in holdings)
        assert num_taken == self._num_taken <= self.num_rows, f"{num_taken} rows are taken, {self._num_taken} counted"
        if not self.is_bounded:
            return
        assert self.num_promised <= self.num_blocks, f"{self.num_promised} of {self.num_blocks} blocks are promised"
        for request_id, promise, num_blocks in holdings:
            promised = promise.num_own + promise.num_in_flight + len(promise.shared)
            assert num_blocks <= promised, f"{request_id} holds {num_blocks} of {promised} promised blocks"
