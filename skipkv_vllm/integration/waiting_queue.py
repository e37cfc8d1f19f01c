"""A waiting queue that admits requests of similar prefill length together and bounds how long one can be overtaken."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


@dataclass(slots=True)
class _Waiting:
    request: Request
    number: int
    """in order of arrival"""
    bucket: int
    turn: float | None
    """time at which first-come-first-served order would have admitted it; None before that"""


@dataclass
class _Line:
    """The waiting requests of one priority."""

    returned: deque[Request] = field(default_factory=deque)
    """preempted and skipped requests, which had their turn already"""
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    """by number, ascending"""
    buckets: dict[int, dict[int, _Waiting]] = field(default_factory=dict)
    numbers: dict[Request, int] = field(default_factory=dict)
    current: int | None = None
    """bucket whose requests are being admitted"""
    num_arrived: int = 0
    num_left: int = 0

    def __len__(self) -> int:
        return len(self.returned) + len(self.waiting)

    def add(self, request: Request, bucket: int, now: float) -> None:
        number = self.num_arrived
        self.num_arrived += 1
        entry = _Waiting(request, number, bucket, now if number == self.num_left else None)
        self.waiting[number] = self.buckets.setdefault(bucket, {})[number] = entry
        self.numbers[request] = number

    def take(self, entry: _Waiting, now: float) -> None:
        """Take a request out of the line; the turn of the next one in order of arrival begins now."""
        del self.waiting[entry.number], self.numbers[entry.request]
        group = self.buckets[entry.bucket]
        del group[entry.number]
        if not group:
            del self.buckets[entry.bucket]
            if self.current == entry.bucket:
                self.current = None
        self.num_left += 1
        following = self.waiting.get(self.num_left)
        if following is not None:
            following.turn = now

    def choose(self, now: float, max_wait: float) -> _Waiting:
        """Return the next request: the oldest if it has waited past its turn for too long, else the bucket's."""
        oldest = next(iter(self.waiting.values()))
        if oldest.turn is not None and now - oldest.turn >= max_wait:
            return oldest
        return oldest if self.current is None else next(iter(self.buckets[self.current].values()))


class PrefillLengthQueue(RequestQueue):
    """vLLM's waiting queue with requests grouped by prompt length.

    The requests of a bucket, `length // width`, are admitted one after the other. When the bucket is empty, the bucket
    of the oldest request follows. No request is held back while there is room, so only the order changes.

    The *turn* of a request begins when as many requests have left as came before it: then first-come-first-served
    order would admit it. From `max_wait` seconds later on, no request that came later is admitted before it.

    Preempted and skipped requests come before all others of their priority, as in vLLM's own queues. With
    `by_priority` a smaller priority comes first whatever its length, and requests are grouped within a priority.

    Args:
        width: tokens by which the prompts of a bucket may differ.
        max_wait: seconds, see above; 0 means first come, first served.
        by_priority: whether vLLM's scheduling policy is "priority".
        clock: a monotonic clock, in seconds.

    Attributes:
        num_overtaking: admissions before a request that came earlier.
        longest_overtaken: most seconds past its turn at which a request was overtaken; always below `max_wait`.
        longest_past_turn: most seconds from the turn of a request to its admission.
    """

    def __init__(
        self, width: int, max_wait: float, *, by_priority: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.width, self.max_wait, self.by_priority, self.clock = width, max_wait, by_priority, clock
        self.num_overtaking = 0
        self.longest_overtaken = self.longest_past_turn = 0.0
        self._lines: dict[int, _Line] = {}
        self._peeked: Request | None = None
        self._peeked_at = 0.0

    def add_request(self, request: Request) -> None:
        self._peeked = None
        self._line(request).add(request, request.num_tokens // self.width, self.clock())

    def peek_request(self) -> Request:
        line, self._peeked_at = self._first(), self.clock()
        if line.returned:
            self._peeked = line.returned[0]
        else:
            self._peeked = line.choose(self._peeked_at, self.max_wait).request
        return self._peeked

    def pop_request(self) -> Request:
        # The scheduler has decided on the request that it peeked at; at this time another one might come first.
        request = self.peek_request() if self._peeked is None else self._peeked
        self._peeked = None
        line, now = self._first(), self._peeked_at
        if line.returned:
            return line.returned.popleft()
        entry, oldest = line.waiting[line.numbers[request]], next(iter(line.waiting.values()))
        if entry is not oldest:
            self.num_overtaking += 1
            if oldest.turn is not None:
                self.longest_overtaken = max(self.longest_overtaken, now - oldest.turn)
        line.current = entry.bucket
        line.take(entry, now)
        if entry.turn is not None:
            self.longest_past_turn = max(self.longest_past_turn, now - entry.turn)
        return request

    def prepend_request(self, request: Request) -> None:
        self._peeked = None
        self._line(request).returned.appendleft(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        self._peeked = None
        line = self._line(request)
        number = line.numbers.get(request)
        if number is None:
            line.returned.remove(request)
        else:
            line.take(line.waiting[number], self.clock())

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request in self:
                self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        return any(request in line.numbers or request in line.returned for line in self._lines.values())

    def __bool__(self) -> bool:
        return any(map(len, self._lines.values()))

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        for _, line in sorted(self._lines.items()):
            yield from line.returned
            yield from (entry.request for entry in line.waiting.values())

    def _line(self, request: Request) -> _Line:
        key = request.priority if self.by_priority else 0
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        return line

    def _first(self) -> _Line:
        occupied = [key for key, line in self._lines.items() if len(line)]
        if not occupied:
            raise IndexError("the queue is empty")
        return self._lines[min(occupied)]
