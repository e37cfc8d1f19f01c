"""When a request is compacted and to how many tokens: functions of token counts, no vLLM, no tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.limits import BEFORE_END, Limits


class PlannedCompaction(NamedTuple):
    """A compaction that is due.

    Attributes:
        num_resident: tokens held before.
        num_keep: tokens held afterwards.
        protected: number of first tokens that must survive.
        num_lookahead: tokens that need lookahead blocks; see `Limits.num_lookahead`.
    """

    num_resident: int
    num_keep: int
    protected: int
    num_lookahead: int = 0


class AccumulationSchedule(NamedTuple):
    """Which queries of a request the workers accumulate, and when.

    Attributes:
        first: first token whose query counts. The request must not take it from the prefix cache.
        interval: tokens between two accumulations; if every query counts, at most as many as the workers keep.
        every_query: whether every query counts, or only those of the window at the end of each interval.
    """

    first: int
    interval: int
    every_query: bool


@dataclass(slots=True)
class EvictionPlanner:
    """Decides when one request is compacted and to how many tokens.

    In each step call `due` and `swaps`, then `accumulate`, then `committed` if the compaction is carried out. `room`
    bounds the tokens that the step may compute.

    Attributes:
        limits: how many tokens the request may hold; None if it keeps everything.
        schedule: which queries are accumulated; None if its method needs no accumulation.
        end: logical length beyond which the request computes no token, so it is not compacted there.
        earliest: logical length before which no compaction or swap is due. In most steps it rules out most requests.
        queries_from: logical length beyond which the newest query is needed, because it may be one of those that the
            next compaction or swap reads.
        num_compactions: compactions since the request started or started over.
    """

    limits: Limits | None
    schedule: AccumulationSchedule | None = None
    end: int = sys.maxsize
    earliest: int = field(init=False)
    queries_from: int = field(init=False)
    num_compactions: int = field(init=False)
    _num_accumulated: int = field(init=False)
    """number of first tokens whose queries have been accumulated"""
    _compacted_from: int = field(init=False)
    """logical length before which no compaction is due"""
    _swapped_at: int = field(init=False)
    """logical length at which a swap is due, if no compaction is"""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start over with nothing computed, as a preempted request does."""
        self.num_compactions = 0
        self._num_accumulated = 0 if self.schedule is None else self.schedule.first
        self._swapped_at = sys.maxsize
        if self.limits is None:
            self._compacted_from = self.earliest = self.queries_from = sys.maxsize
        else:
            self._next_due(self.limits.first_due, self.limits)

    @property
    def is_done(self) -> bool:
        """Whether the request will not be compacted again, or never."""
        return self._compacted_from == sys.maxsize

    @property
    def bound(self) -> int | None:
        """The most tokens that the request may hold now; None if it keeps everything."""
        if self.limits is None:
            return None
        return self.limits.bound if self.num_compactions else self.limits.first_bound

    def due(self, num_logical: int, num_evicted: int) -> PlannedCompaction | None:
        """Return the compaction that is due; None if none is. Nothing changes until `committed`.

        Args:
            num_logical: tokens computed so far, those in flight included.
            num_evicted: tokens that are no longer held.
        """
        limits, bound, num_resident = self.limits, self.bound, num_logical - num_evicted
        if limits is None or bound is None or num_logical < self._compacted_from:
            return None
        at_prompt_end = num_logical == limits.prompt_end and num_resident > limits.keep
        if num_resident < bound and not at_prompt_end:
            return None
        return PlannedCompaction(num_resident, limits.keep, limits.protected, limits.num_lookahead(num_logical))

    def committed(self, num_logical: int) -> None:
        """Note that the compaction due at `num_logical` tokens is carried out."""
        limits = self.limits
        assert limits is not None
        self.num_compactions += 1
        self._swapped_at = self._next_swap(num_logical, limits)
        due = num_logical + limits.buffer
        self._next_due(min(due, limits.prompt_end) if num_logical < limits.prompt_end else due, limits)

    def swaps(self, num_logical: int) -> bool:
        """Return whether recalled tokens are exchanged now, and note it. No compaction may be due."""
        limits = self.limits
        if limits is None or num_logical < self._swapped_at:
            return False
        self._swapped_at = self._next_swap(num_logical, limits)
        self._next_due(self._compacted_from, limits)
        return True

    def _next_swap(self, num_logical: int, limits: Limits) -> int:
        """Return the logical length of the first swap after `num_logical` tokens."""
        recall = limits.recall
        if recall is None or not limits.num_recalled:
            return sys.maxsize
        for before in BEFORE_END:
            if num_logical < recall.num_prompt - before:
                return recall.num_prompt - before
        num_decoded = max(num_logical - recall.num_prompt, 0)
        next_swap = recall.num_prompt + (num_decoded // recall.interval + 1) * recall.interval
        return next_swap if next_swap < self.end else sys.maxsize

    def _next_due(self, compacted_from: int, limits: Limits) -> None:
        # With asynchronous scheduling a request still runs when its last token is in flight.
        if compacted_from >= self.end:
            compacted_from = sys.maxsize
        self._compacted_from = compacted_from
        self.earliest = min(compacted_from, self._swapped_at)
        self.queries_from = self.earliest - limits.num_queries

    def room(self, num_logical: int, num_evicted: int) -> int:
        """Return how many tokens the coming step may compute; at least one.

        A chunk of a prompt, or of the text of a resumed request, ends at the bound. So the request is compacted at the
        same tokens however its text is cut into chunks. If every query is accumulated, a chunk has at most as many
        tokens as the workers keep queries; if segments are measured, a chunk ends at the end of a segment. A chunk also
        ends where tokens are swapped.
        """
        limits, bound = self.limits, self.bound
        if limits is None or bound is None:
            return sys.maxsize
        room = bound - (num_logical - num_evicted)
        if num_logical < limits.prompt_end:
            # A resumed request has more text than its prompt.
            room = min(room, limits.prompt_end - num_logical)
        if self._swapped_at > num_logical:
            room = min(room, self._swapped_at - num_logical)
        if self.schedule is not None and not self.is_done:
            room = min(room, self._num_accumulated + self.schedule.interval - num_logical)
        assert room > 0, f"{num_logical - num_evicted} tokens were not compacted at the bound of {bound}"
        return room

    def without_drafts_beyond(
        self, num_logical: int, num_evicted: int, *, num_new: int, num_known: int, are_verified: bool
    ) -> int:
        """Return how many tokens the coming step may compute if the last of them are drafts; 0 if none at all.

        The next compaction, swap or accumulation needs the exact number of tokens. Until the drafts of a step are
        verified, the scheduler counts all of them, and takes those off that were rejected afterwards. If they are not
        verified when the next step is planned, a step with drafts must end before that point, and a step without any
        reaches it. So what is counted there is exact, and a request is compacted at the same tokens as without drafts.

        Args:
            num_logical: tokens computed so far, drafts in flight included.
            num_evicted: see `due`.
            num_new: tokens that the step would compute.
            num_known: how many of these are no drafts.
            are_verified: whether the drafts of a step are verified before the next one is planned.
        """
        if self.bound is None:
            return num_new
        if self.is_done and num_logical - num_evicted >= self.bound:
            return 0  # it has ended, unless drafts in flight are rejected
        room = self.room(num_logical, num_evicted)
        if room <= num_new and num_known < room and not are_verified and self.earliest < sys.maxsize:
            room -= 1
        return min(num_new, room)

    def accumulate(self, num_logical: int, moves_tokens: bool) -> int:
        """Return the number of newest queries to accumulate now, and note them as accumulated.

        The workers keep only the newest queries. If every query counts, accumulate them before the ring overwrites them
        and before each compaction or swap, while all tokens that they attended to are held. Otherwise only the last
        queries of each interval are measured.

        Args:
            num_logical: tokens computed so far.
            moves_tokens: whether the request is compacted in this step, or tokens of it are swapped.
        """
        schedule = self.schedule
        if self.limits is None or schedule is None or self.is_done:
            return 0
        num_pending = num_logical - self._num_accumulated
        is_due = num_pending >= schedule.interval or (schedule.every_query and num_pending > 0 and moves_tokens)
        if not is_due:
            return 0
        self._num_accumulated = num_logical
        return min(num_pending, schedule.interval if schedule.every_query else self.limits.window)
