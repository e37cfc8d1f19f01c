"""Which compactions of a step can run in one launch."""

from __future__ import annotations

import pytest
import torch

from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Accumulation, Compaction
from skipkv_vllm.policies import make_policy
from skipkv_vllm.worker import compaction_batch
from skipkv_vllm.worker.cache import Room
from skipkv_vllm.worker.compaction_batch import in_parts, independent
from skipkv_vllm.worker.requests import Job, ManagedRequest, Reading

SIZE = 4
STREAMING = make_policy("streaming_llm")


def job(name: str, source: list[int], target: list[int], *, protected: int = 0, policy=STREAMING) -> Job:
    order = Compaction(name, 4 * len(source), 4 * len(source), 4 * len(target), source, target, 0)
    return Job(order, ManagedRequest(row=0, policy=policy, needs=Need.NOTHING, protected=protected))


def parts(*jobs: Job) -> list[list[str]]:
    return [[each.order.request_id for each in part] for part in independent(jobs, SIZE, Room(1000), 8)]


def test_requests_with_pages_of_their_own_go_together():
    assert parts(job("a", [1, 2, 3], [1, 2]), job("b", [4, 5, 6], [4, 5])) == [["a", "b"]]


def test_a_page_given_up_by_one_and_taken_by_another():
    # b's block 4 is shared, and its replacement is the block that a releases, so a's must be read first.
    assert parts(job("a", [1, 2, 3], [1, 2]), job("b", [4, 5, 6], [3, 5])) == [["a"], ["b"]]


def test_a_shared_page_that_its_last_owner_writes():
    # a replaces the block it shares with b, which b then owns alone and writes in place.
    assert parts(job("a", [1, 2, 3], [7, 2]), job("b", [1, 5, 6], [1, 5])) == [["a"], ["b"]]


def test_a_shared_protected_prompt_is_no_conflict():
    assert parts(
        job("a", [1, 2, 3], [1, 2], protected=SIZE),
        job("b", [1, 5, 6], [1, 5], protected=SIZE),
    ) == [["a", "b"]]


def test_a_page_that_is_partly_prompt_is_written():
    assert parts(
        job("a", [1, 2, 3], [1, 2], protected=SIZE - 1),
        job("b", [1, 5, 6], [1, 5], protected=SIZE - 1),
    ) == [["a"], ["b"]]


def test_other_methods_wait_their_turn():
    rkv = make_policy("rkv")
    jobs = [job("a", [1, 2], [1]), job("b", [3, 4], [3]), job("c", [5, 6], [5], policy=rkv), job("d", [7, 8], [7])]
    assert parts(*jobs) == [["a", "b"], ["c"], ["d"]]


def test_a_launch_has_no_more_slots_than_it_may():
    jobs = [job(name, [3 * i, 3 * i + 1, 3 * i + 2], [3 * i]) for i, name in enumerate("abcde")]
    runs = independent(jobs, SIZE, Room(2 * 3 * SIZE), 8)
    assert [[each.order.request_id for each in part] for part in runs] == [["a", "b"], ["c", "d"], ["e"]]
    assert [len(part) for part in independent(jobs, SIZE, Room(1), 8)] == [1] * 5


@pytest.mark.parametrize(("policy", "expected"), [("rkv", [2, 2, 1]), ("streaming_llm", [5]), ("skipkv", [5])])
def test_a_launch_has_no_more_queries_than_it_may(policy, expected):
    """A query of all layers takes as much memory as 10 slots; methods that read none are not limited by them."""
    chosen = make_policy(policy)
    jobs = [job(name, [i], [i], policy=chosen) for i, name in enumerate("abcde")]
    room = Room(5 * SIZE + 2 * 8 * 10, query=10.0)
    assert [len(part) for part in independent(jobs, SIZE, room, 8)] == expected
    for each in jobs:
        each.request.lookahead_queries = torch.zeros(2, 16, 3, 8)
    assert [len(part) for part in independent(jobs, SIZE, room, 8)] == [1] * 5


def reading(length: int, queries: int) -> Reading:
    order = Accumulation("a", length, length, queries, [0])
    return Reading(order, ManagedRequest(row=0, policy=make_policy("h2o"), needs=Need.ATTENTION_MASS))


def test_an_accumulation_has_no_more_queries_than_it_may():
    readings = [reading(40 + i, 32) for i in range(5)]
    assert [len(part) for part in in_parts(readings, Room(250))] == [5]
    assert [len(part) for part in in_parts(readings, Room(250, query=1.0))] == [3, 2]
    assert [len(part) for part in in_parts(readings, Room(1, query=1.0))] == [1] * 5
    # What counts is the most queries of one of them, which a longer one may have.
    few = [reading(40, 2), reading(41, 2), reading(42, 32)]
    assert [len(part) for part in in_parts(few, Room(150, query=1.0))] == [2, 1]
    turns = [reading(40, 2), reading(41, 32), reading(42, 32), reading(44, 2)]
    assert [len(part) for part in in_parts(turns, Room(150, query=1.0))] == [2, 1, 1]


def test_many_compactions_of_a_step_cost_the_host_little():
    """Doubling the number of requests must not quadruple the work, which is counted in set operations."""

    class Counted(set[int]):
        visited = 0

        def isdisjoint(self, other):
            Counted.visited += min(len(self), len(other))
            return super().isdisjoint(other)

    def visited(number: int) -> int:
        Counted.visited = 0
        jobs = [job(str(i), [*range(20 * i, 20 * i + 20)], [*range(20 * i, 20 * i + 16)]) for i in range(number)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compaction_batch, "set", Counted, raising=False)
            assert len(list(independent(jobs, SIZE, Room(10**9), 8))) == 1
        return Counted.visited

    assert 0 < visited(128) < 2.5 * visited(64)


def test_several_conflicts_in_a_row():
    jobs = [job("a", [1, 2], [1]), job("b", [3, 4], [2]), job("c", [5, 6], [4]), job("d", [7, 8], [7])]
    assert parts(*jobs) == [["a"], ["b"], ["c", "d"]]
