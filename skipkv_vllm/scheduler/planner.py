"""When a request is compacted and to how many tokens: pure functions of token counts, no vLLM, no tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.limits import Limits


class Residency(NamedTuple):
    """Token counts of a running request at the start of a step (tokens in flight included)."""

    request_id: str
    num_logical: int
    num_evicted: int


class PlannedCompaction(NamedTuple):
    """A compaction that is due: from `num_resident` to exactly `num_keep` tokens."""

    request_id: str
    num_resident: int
    num_keep: int
    protected: int
    num_lookahead: int = 0


class Looks(NamedTuple):
    """Which queries' attention a request's method looks at, and when.

    Attributes:
        first: first token whose query counts. The request must not take it from the prefix cache.
        interval: tokens between two looks; where all queries count, at most as many as the workers keep.
        at_all: whether every query counts, or only the window's at the end of each interval.
    """

    first: int
    interval: int
    at_all: bool


@dataclass
class _Request:
    limits: Limits
    looks: Looks | None
    num_observed: int
    """tokens up to which attention was looked at, where somebody asks for it"""
    num_compactions: int = 0

    @property
    def bound(self) -> int:
        """Resident length that triggers the next compaction."""
        return self.limits.bound if self.num_compactions else self.limits.first_bound

    def is_due(self, num_logical: int, num_resident: int) -> bool:
        """Whether it is compacted now."""
        at_prompt_end = num_logical == self.limits.prompt_end and num_resident > self.limits.keep
        return num_resident >= self.bound or at_prompt_end


@dataclass
class EvictionPlanner:
    """Decides which running requests are compacted in a step. Knows nothing but counts."""

    _requests: dict[str, _Request] = field(default_factory=dict)
    earliest: dict[str, int] = field(default_factory=dict)
    """logical length before which a started request is not due; spares most requests a closer look at most steps"""

    def start(self, request_id: str, limits: Limits, looks: Looks | None = None) -> None:
        """A request arrives.

        Args:
            request_id: its id.
            limits: what it may hold.
            looks: which queries' attention is looked at; None where nobody asks for it.
        """
        self._requests[request_id] = _Request(limits, looks, 0 if looks is None else looks.first)
        self.earliest[request_id] = limits.first_due

    def restart(self, request_id: str) -> None:
        """The request was preempted: when it resumes, it starts over with nothing computed."""
        request = self._requests.get(request_id)
        if request is not None:
            self.start(request_id, request.limits, request.looks)

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
            if request.is_due(num_logical, num_resident):
                num_lookahead = limits.num_lookahead(num_logical)
                planned.append(
                    PlannedCompaction(request_id, num_resident, limits.keep, limits.protected, num_lookahead)
                )
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
        if num_logical < request.limits.prompt_end:
            # A resumed request has more text than its prompt.
            room = min(room, request.limits.prompt_end - num_logical)
        if request.looks is not None:
            room = min(room, request.num_observed + request.looks.interval - num_logical)
        assert room > 0, f"{request_id} was not compacted at {request.bound} tokens"
        return room

    def observe(self, request_id: str, num_logical: int, is_compacted: bool) -> int:
        """Number of newest queries whose attention must be looked at now, 0 if none; they then are.

        The workers keep only the newest queries. So where all of them count they are looked at before they are
        overwritten, and before a compaction, while all the tokens they saw are still held; else at the end of every
        segment.
        """
        request = self._requests.get(request_id)
        if request is None or request.looks is None:
            return 0
        looks, pending = request.looks, num_logical - request.num_observed
        is_due = pending >= looks.interval or (looks.at_all and pending > 0 and is_compacted)
        if not is_due:
            return 0
        request.num_observed = num_logical
        return min(pending, looks.interval if looks.at_all else request.limits.window)

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
        due, prompt_end = num_logical + request.limits.buffer, request.limits.prompt_end
        self.earliest[request_id] = min(due, prompt_end) if num_logical < prompt_end else due
