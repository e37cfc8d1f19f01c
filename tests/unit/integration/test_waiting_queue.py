"""The grouping queue: its bound against an independent count, no starvation or loss, priorities, preemptions."""

from __future__ import annotations

import itertools
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration.waiting_queue import PrefillLengthQueue


class Request(SimpleNamespace):
    """Stands in for vLLM's request; hashed by identity like it."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_number = itertools.count()


def request(length: int, priority: int = 0) -> Any:
    return Request(request_id=str(next(_number)), num_tokens=length, priority=priority)


def make(width: int = 10, max_wait: float = 5.0, **options: Any) -> tuple[PrefillLengthQueue, Clock]:
    clock = Clock()
    return PrefillLengthQueue(width, max_wait, clock=clock, **options), clock


def lengths(requests) -> list[int]:
    return [r.num_tokens for r in requests]


def drain(queue: RequestQueue) -> list[Any]:
    return [queue.pop_request() for _ in range(len(queue))]


def fill(queue: RequestQueue, *prompt_lengths: int) -> list[Any]:
    requests = [request(length) for length in prompt_lengths]
    for each in requests:
        queue.add_request(each)
    return requests


def test_similar_lengths_are_admitted_together():
    queue, _ = make()
    fill(queue, 5, 30, 7, 31, 90, 3, 39)
    assert lengths(drain(queue)) == [5, 7, 3, 30, 31, 39, 90]
    assert not queue


def test_the_group_goes_on_with_later_arrivals_until_somebody_is_past_its_turn():
    queue, clock = make(max_wait=5.0)
    fill(queue, 5, 30, 6)
    assert queue.pop_request().num_tokens == 5  # 30 has its turn at 0
    clock.now = 4.9
    fill(queue, 7)
    assert queue.pop_request().num_tokens == 6
    clock.now = 5.0
    assert queue.pop_request().num_tokens == 30
    assert queue.pop_request().num_tokens == 7
    assert (queue.num_overtaking, queue.longest_overtaken, queue.longest_past_turn) == (1, 4.9, 5.0)


def test_a_request_that_never_had_its_turn_does_not_age():
    # Behind a long queue every request waits long, which must not dissolve groups.
    queue, clock = make(max_wait=5.0)
    fill(queue, *[5, 30] * 10)
    clock.now = 1000.0
    assert lengths(drain(queue)) == [5] * 10 + [30] * 10


def test_no_wait_is_first_come_first_served():
    queue, _ = make(max_wait=0.0)
    asked = fill(queue, 5, 90, 6, 40, 90, 7)
    assert drain(queue) == asked


def test_what_was_peeked_is_popped_although_the_clock_goes_on():
    queue, clock = make()
    fill(queue, 5, 30, 6)
    queue.pop_request()
    peeked = queue.peek_request()
    clock.now = 100.0
    assert queue.pop_request() is peeked
    assert peeked.num_tokens == 6


def test_preempted_and_skipped_requests_come_first_in_vllms_order():
    queue, clock = make()
    fill(queue, 5, 30, 6)
    stock = FCFSRequestQueue()
    back = [request(77), request(5), request(90)]
    for each in (queue, stock):
        each.prepend_requests(deque(back[1:]))
        each.prepend_request(back[0])
    clock.now = 100.0
    assert drain(queue)[:3] == drain(stock)


@pytest.mark.parametrize("by_priority", [True, False])
def test_priorities_count_where_vllm_counts_them(by_priority):
    queue, clock = make(by_priority=by_priority)
    low, lower = request(5, priority=1), request(5, priority=2)
    high = request(30, priority=0)
    for each in (lower, low, high):
        queue.add_request(each)
    queue.prepend_request(back := request(90, priority=1))
    clock.now = 1000.0
    assert drain(queue) == ([high, back, low, lower] if by_priority else [back, lower, low, high])


def test_removed_requests_are_gone_and_strangers_do_no_harm():
    queue, _ = make()
    a, b, c, d = fill(queue, 5, 30, 6, 31)
    queue.prepend_request(back := request(7))
    queue.remove_requests({a, back, request(1)})
    queue.remove_request(d)
    assert list(queue) == [b, c]
    assert len(queue) == 2
    assert a not in queue
    assert drain(queue) == [b, c]
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()


def test_a_stream_of_the_same_length_starves_nobody():
    queue, clock = make(max_wait=5.0)
    fill(queue, 5, 500)
    admitted = []
    while 500 not in admitted:
        fill(queue, 5, 6)
        admitted.append(queue.pop_request().num_tokens)
        clock.now += 1.0
    # Its turn is the second admission, at 0 s; those at 1 to 4 s go to others.
    assert len(admitted) == 6


OPERATION = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 60)),
    st.tuples(st.just("pop"), st.just(0)),
    st.tuples(st.just("pop"), st.just(1)),  # a moment passes between peek and pop
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("preempt"), st.integers(1, 60)),
    st.tuples(st.just("skip"), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPERATION, max_size=120), st.integers(1, 30), st.integers(0, 6))
def test_bound_and_conservation(operations, width, max_wait):
    queue, clock = make(width, float(max_wait))
    arrived: list[tuple[Any, float]] = []
    left: list[float] = []  # when the n-th request left
    waiting, returned, popped = [], [], []

    def turn(number: int) -> float | None:
        """Count again from the log: when as many requests had left as came before."""
        at_arrival = arrived[number][1]
        if number == 0:
            return at_arrival
        return max(at_arrival, left[number - 1]) if len(left) >= number else None

    def leave(one: Any, now: float, admitted: bool) -> None:
        if one in returned:
            assert not admitted or one is returned[0]
            returned.remove(one)
            return
        assert not admitted or not returned
        number = next(i for i, (other, _) in enumerate(arrived) if other is one)
        for other in waiting:
            earlier = next(i for i, (each, _) in enumerate(arrived) if each is other)
            due = turn(earlier)
            if admitted and earlier < number and due is not None:
                assert now - due < max_wait, "a request was overtaken after its bound"
        waiting.remove(one)
        left.append(now)

    for name, value in operations:
        if name == "add":
            one = request(value)
            arrived.append((one, clock.now))
            queue.add_request(one)
            waiting.append(one)
        elif name == "preempt":
            queue.prepend_request(one := request(value))
            returned.insert(0, one)
        elif name == "wait":
            clock.now += value
        elif name == "remove" and waiting:
            one = waiting[value % len(waiting)]
            queue.remove_requests([one])
            leave(one, clock.now, admitted=False)
        elif name in ("pop", "skip") and (waiting or returned):
            peeked, decided = queue.peek_request(), clock.now
            clock.now += value
            assert queue.pop_request() is peeked
            leave(peeked, decided, admitted=True)
            if name == "skip":
                queue.prepend_requests([peeked])
                returned.insert(0, peeked)
            else:
                popped.append(peeked)
        assert len(queue) == len(waiting) + len(returned)
        assert bool(queue) == bool(waiting or returned)
        assert list(queue) == returned + waiting
    assert queue.longest_overtaken < max_wait or not queue.num_overtaking
    rest = drain(queue)
    assert {id(r) for r in rest} == {id(r) for r in waiting + returned}
    assert not any(r in popped for r in rest)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_grouping_width": 64}, "kv_batch_grouping is 'off'"),
        ({"kv_grouping_max_wait": 1.0}, "kv_batch_grouping is 'off'"),
        ({"kv_policy": "full", "kv_batch_grouping": "prefill-length"}, "so vLLM's own scheduler runs"),
        ({"kv_policy": "full", "kv_prefix_eviction": "guard"}, "drop --kv-prefix-eviction"),
        ({"kv_batch_grouping": "prefill-length", "kv_grouping_width": 0}, "kv_grouping_width=0"),
        ({"kv_batch_grouping": "prefill-length", "kv_grouping_max_wait": -1.0}, "kv_grouping_max_wait=-1.0"),
        ({"kv_defer_prompt": True}, "the prompt is protected"),
        ({"kv_batch_grouping": "length"}, "kv_batch_grouping='length'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(KVPolicyError) as error:
        KVPolicyConfig.parse({"kv_policy": "skipkv"} | options)
    assert said in str(error.value)
