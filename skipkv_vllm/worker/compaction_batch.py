"""The compactions of a step as the operators see them: several requests at once, on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.device import to_device
from ..core.needs import Need
from ..policies import Policy
from .cache import KVCache, Room
from .requests import Job, Reading


class CompactionBatch(NamedTuple):
    """R requests of one policy that are compacted together; tensors are int32 on the device.

    Attributes:
        jobs: the requests.
        source_table, target_table: kernel pages before and after, `[R, pages]`.
        num_resident, num_keep, pin_below, pin_from, rows, num_logical: `[R]`.
        positions: `[R, layers, H, N]` by slot.
    """

    jobs: Sequence[Job]
    source_table: Tensor
    target_table: Tensor
    num_resident: Tensor
    num_keep: Tensor
    pin_below: Tensor
    pin_from: Tensor
    rows: Tensor
    num_logical: Tensor
    positions: Tensor

    @classmethod
    def of(cls, jobs: Sequence[Job], cache: KVCache, window: int) -> CompactionBatch:
        """Copy what the operators need of some jobs to the device."""
        numbers = [
            (
                order.num_resident,
                order.num_keep,
                max(request.protected, request.policy.num_sinks),
                order.num_logical - window,
                request.row,
                order.num_logical,
                request.num_placed,
                order.num_evicted_before,
            )
            for order, request in jobs
        ]
        columns = to_device(np.array(numbers, dtype=np.int32).T.copy(), torch.int32, cache.device)
        num_resident, num_keep, below, from_, rows, num_logical, num_placed, num_evicted = columns.unbind()
        source_table = cache.table([job.order.source_blocks for job in jobs])
        length = max(job.order.num_resident + job.request.num_question for job in jobs)
        positions = cache.positions(source_table, length, num_placed, num_evicted)
        target_table = cache.table([job.order.target_blocks for job in jobs])
        numbers_of_batch = (num_resident, num_keep, below, from_, rows, num_logical)
        return cls(jobs, source_table, target_table, *numbers_of_batch, positions)

    @property
    def policy(self) -> Policy:
        """The method of all requests."""
        return self.jobs[0].request.policy

    @property
    def needs(self) -> Need:
        """Inputs that are collected for the requests."""
        return self.jobs[0].request.needs

    @property
    def longest(self) -> int:
        """Logical length of the longest request."""
        return max(order.num_logical for order, _ in self.jobs)

    @property
    def length(self) -> int:
        """N, the number of slots that are looked at."""
        return self.positions.shape[-1]


class Moves(NamedTuple):
    """Move lists of R requests, as returned by `ops.select_keep`: `[R, layers, H, M]`, and their number."""

    source: Tensor
    hole: Tensor
    number: Tensor

    @property
    def valid(self) -> Tensor:
        """bool, of the shape of `source`."""
        return torch.arange(self.source.shape[-1], device=self.source.device) < self.number[..., None]

    def follow(self, entries: Tensor, num_keep: Tensor) -> Tensor:
        """Move entries by slot, `[..., R, layers, H, N]`, as their tokens move; those from slot `num_keep` on are void.

        Args:
            entries: the entries before; N is above the largest `num_keep`.
            num_keep: int32 `[R]`.
        """
        # Padding goes to a place beyond the kept ones.
        target = torch.where(self.valid, self.hole, num_keep.view(-1, 1, 1, 1)).long()
        shape = (*entries.shape[:-1], self.source.shape[-1])
        return entries.scatter(-1, target.expand(shape), entries.gather(-1, self.source.long().expand(shape)))


def reads_queries(policy: Policy) -> bool:
    """Return whether a compaction of this method reads the newest queries."""
    return bool(policy.needs & Need.QUERIES) and not policy.needs & Need.OUTPUT_ERROR


def _num_queries(job: Job, window: int) -> int:
    """Return how many queries a compaction reads."""
    ahead = job.request.lookahead_queries
    return window * reads_queries(job.request.policy) + (0 if ahead is None else ahead.shape[1])


def independent(jobs: Sequence[Job], block_size: int, room: Room, window: int) -> Iterator[list[Job]]:
    """Split jobs into runs that one launch may carry out.

    The jobs of a run have one policy, and none writes a block that another uses: a block that an earlier job gives up
    may be the fresh block of a later one. All ranks find the same runs. The work grows with the number of blocks.

    Args:
        jobs: the compactions of a step, in order.
        block_size: tokens of a block.
        room: what a run may hold; a single job may exceed it.
        window: W, queries that a compaction reads.
    """
    part: list[Job] = []
    read: set[int] = set()
    written: set[int] = set()
    longest = most_queries = 0
    for job in jobs:
        longest = max(longest, job.order.num_resident)
        most_queries = max(most_queries, _num_queries(job, window))
        uses = set(job.order.source_blocks)
        # Blocks that lie wholly in a protected prompt may be shared, but nothing in them changes.
        writes = set(job.order.target_blocks[job.request.protected // block_size :])
        differs = part and job.request.policy != part[0].request.policy
        is_full = not room.holds(len(part) + 1, longest, most_queries)
        # Unlike a union or an intersection, `isdisjoint` looks at the smaller set only.
        is_apart = writes.isdisjoint(read) and writes.isdisjoint(written) and uses.isdisjoint(written)
        if part and (differs or is_full or not is_apart):
            yield part
            part, read, written = [], set(), set()
            longest, most_queries = job.order.num_resident, _num_queries(job, window)
        part.append(job)
        read |= uses
        written |= writes
    if part:
        yield part


def in_parts(readings: Sequence[Reading], room: Room) -> Iterator[list[Reading]]:
    """Split accumulations, by length, into parts that one launch may carry out; see `independent` for `room`."""
    part: list[Reading] = []
    most_queries = 0
    for each in sorted(readings, key=lambda each: each.order.num_resident):
        most_queries = max(most_queries, each.order.num_queries)
        if part and not room.holds(len(part) + 1, each.order.num_resident, most_queries):
            yield part
            part, most_queries = [], each.order.num_queries
        part.append(each)
    if part:
        yield part
