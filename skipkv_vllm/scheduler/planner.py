"""When a request is compacted and to how many tokens: pure functions of token counts, no vLLM, no tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Limits:
    """What one request may hold, in tokens.

    Attributes:
        budget: B, what it is compacted to.
        buffer: b, how far it may grow beyond that.
        window: W, newest tokens that always survive.
        protected: length of the prompt where it is protected, else 0.
        deferred: length of the prompt where it is held whole until W more tokens are computed, whose queries then
            choose; else 0.
    """

    budget: int
    buffer: int
    window: int
    protected: int
    deferred: int = 0

    @property
    def keep(self) -> int:
        """Resident length after a compaction: the budget, or prompt + window where that is more."""
        return max(self.budget, self.protected + self.window)

    @property
    def bound(self) -> int:
        """Resident length that triggers a compaction."""
        return self.keep + self.buffer

    @property
    def first_bound(self) -> int:
        """Resident length that triggers the first compaction, and the most the request ever holds."""
        return max(self.bound, self.deferred + self.window if self.deferred else 0)

    @property
    def cacheable(self) -> int:
        """Tokens it may take from the prefix cache: the last W before a compaction are computed, for their queries."""
        return self.first_bound - self.window


class Residency(NamedTuple):
    """Token counts of a running request at the start of a step (tokens in flight included)."""

    request_id: str
    num_logical: int
    num_evicted: int


class PlannedCompaction(NamedTuple):
    """Compact `request_id` from `num_resident` to exactly `num_keep` tokens."""

    request_id: str
    num_resident: int
    num_keep: int
    protected: int


class Observation(NamedTuple):
    """An order to the workers: look at the attention of the newest queries. They add it to the mass of the held
    tokens, or note how sparse it is, whichever the request's method needs.

    Attributes:
        request_id: whose cache.
        num_logical: tokens computed so far.
        num_resident: tokens held, in the first slots of `pages`.
        num_queries: queries to look at, the newest; at most the window.
        pages: block ids.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_queries: int
    pages: list[int]


class Compaction(NamedTuple):
    """An order to the workers: a planned compaction with the pages that the block manager assigned.

    Attributes:
        request_id: whose cache.
        num_logical: tokens computed so far; the newest held token has position `num_logical - 1`.
        num_resident: tokens held before, in the first slots of `source_pages`.
        num_keep: tokens held afterwards, in the first slots of `target_pages`.
        source_pages: block ids before.
        target_pages: block ids afterwards, a page each either the same as before or fresh.
        ordinal: number of compactions of this request before this one.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_keep: int
    source_pages: list[int]
    target_pages: list[int]
    ordinal: int

    @property
    def num_evicted_before(self) -> int:
        """Tokens evicted by earlier compactions; both sides know it, so the worker can check."""
        return self.num_logical - self.num_resident


@dataclass
class _Request:
    limits: Limits
    first_observed: int | None
    segment: int | None
    num_observed: int | None
    """tokens whose attention was looked at; None where nobody asks for it"""
    num_compactions: int = 0

    @property
    def bound(self) -> int:
        """Resident length that triggers the next compaction."""
        return self.limits.bound if self.num_compactions else self.limits.first_bound

    @property
    def interval(self) -> int:
        """Tokens between two looks at the attention."""
        return self.limits.window if self.segment is None else self.segment


@dataclass
class EvictionPlanner:
    """Decides which running requests are compacted in a step. Knows nothing but counts."""

    _requests: dict[str, _Request] = field(default_factory=dict)
    earliest: dict[str, int] = field(default_factory=dict)
    """logical length before which a started request is not due; spares most requests a closer look at most steps"""

    def start(
        self, request_id: str, limits: Limits, first_observed: int | None = None, segment: int | None = None
    ) -> None:
        """A request arrives.

        Args:
            request_id: its id.
            limits: what it may hold.
            first_observed: first token whose attention is looked at; None where nobody asks for it. The request must
                not take that token from the prefix cache.
            segment: tokens after which the newest queries are looked at; None where every query counts.
        """
        self._requests[request_id] = _Request(limits, first_observed, segment, first_observed)
        self.earliest[request_id] = limits.first_bound

    def restart(self, request_id: str) -> None:
        """The request was preempted: when it resumes, it starts over with nothing computed."""
        request = self._requests.get(request_id)
        if request is not None:
            self.start(request_id, request.limits, request.first_observed, request.segment)

    def stop(self, request_id: str) -> None:
        """The request finished or was aborted."""
        self._requests.pop(request_id, None)
        self.earliest.pop(request_id, None)

    def limits(self, request_id: str) -> Limits | None:
        """Limits of a started request; None for one that keeps everything."""
        request = self._requests.get(request_id)
        return None if request is None else request.limits

    def bound(self, request_id: str) -> int | None:
        """Most tokens that a started request may hold now; None for one that keeps everything."""
        request = self._requests.get(request_id)
        return None if request is None else request.bound

    def num_compactions(self, request_id: str) -> int:
        """Compactions of this request since it started."""
        return self._requests[request_id].num_compactions

    def plan(self, running: Iterable[Residency]) -> list[PlannedCompaction]:
        """The compactions due now. Requests that were never started keep everything."""
        planned = []
        for request_id, num_logical, num_evicted in running:
            request = self._requests.get(request_id)
            if request is None:
                continue
            limits, num_resident = request.limits, num_logical - num_evicted
            if num_resident >= request.bound:
                planned.append(PlannedCompaction(request_id, num_resident, limits.keep, limits.protected))
        return planned

    def room(self, request_id: str, num_logical: int, num_evicted: int) -> int:
        """Tokens of a request that the coming step may compute, once it was compacted if due; at least one.

        A chunk of a prompt, or of the text of a resumed request, ends at the bound, so that the request is compacted
        at the very same tokens however its text is cut into chunks. Where attention is added up, a chunk has no more
        tokens than the workers keep queries of; where it is looked at by segment, a chunk ends where a segment does.
        """
        request = self._requests.get(request_id)
        if request is None:
            return sys.maxsize
        room = request.bound - (num_logical - num_evicted)
        if request.num_observed is not None:
            room = min(room, request.num_observed + request.interval - num_logical)
        assert room > 0, f"{request_id} was not compacted at {request.bound} tokens"
        return room

    def observe(self, request_id: str, num_logical: int, is_compacted: bool) -> int:
        """Number of newest queries whose attention must be looked at now, 0 if none; they then are.

        The workers keep only the last W queries. So where all of them count they are looked at every W tokens, and
        before a compaction, while all the tokens they saw are still held; else at the end of every segment.
        """
        request = self._requests.get(request_id)
        if request is None or request.num_observed is None:
            return 0
        pending = num_logical - request.num_observed
        is_due = pending >= request.interval or (request.segment is None and pending > 0 and is_compacted)
        if not is_due:
            return 0
        request.num_observed = num_logical
        return min(pending, request.limits.window)

    def needs_queries(self, request_id: str, num_logical: int) -> bool:
        """Whether one of the newest queries will be among the last W when the request may next be compacted.

        Args:
            request_id: a running request.
            num_logical: tokens computed once the coming step is done.
        """
        earliest = self.earliest.get(request_id)
        return earliest is not None and num_logical > earliest - self._requests[request_id].limits.window

    def committed(self, request_id: str, num_logical: int) -> None:
        """The planned compaction was carried out when `num_logical` tokens were computed."""
        request = self._requests[request_id]
        request.num_compactions += 1
        self.earliest[request_id] = num_logical + request.limits.buffer
