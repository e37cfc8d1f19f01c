"""Which compactions of a step can run in one launch."""

from __future__ import annotations

from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.policies import make_policy
from skipkv_vllm.worker.compaction_batch import independent
from skipkv_vllm.worker.requests import Job, ManagedRequest

SIZE = 4
STREAMING = make_policy("streaming_llm")


def job(name: str, source: list[int], target: list[int], *, protected: int = 0, policy=STREAMING) -> Job:
    order = Compaction(name, 4 * len(source), 4 * len(source), 4 * len(target), source, target, 0)
    return Job(order, ManagedRequest(row=0, policy=policy, needs=Need.NOTHING, protected=protected))


def parts(*jobs: Job) -> list[list[str]]:
    return [[each.order.request_id for each in part] for part in independent(jobs, SIZE)]


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


def test_several_conflicts_in_a_row():
    jobs = [job("a", [1, 2], [1]), job("b", [3, 4], [2]), job("c", [5, 6], [4]), job("d", [7, 8], [7])]
    assert parts(*jobs) == [["a"], ["b"], ["c", "d"]]
