"""Exchanges with the store: which requests share a launch, what regions hold, and what a question asked for."""

from __future__ import annotations

import torch

from skipkv_vllm.core.needs import NUM_ASKING, Need
from skipkv_vllm.core.orders import Stored, Swap
from skipkv_vllm.policies import make_policy
from skipkv_vllm.worker.cache import Room
from skipkv_vllm.worker.recall import NUM_ANSWERING, Exchange, in_parts, remember
from skipkv_vllm.worker.regions import best, largest, marked, placed
from skipkv_vllm.worker.requests import ManagedRequest


def exchange(name: str, num_tokens: int, *, num_keep: int = 100, most: int = 20, num_logical: int = 900) -> Exchange:
    stored = Stored(0, 0, num_tokens, [0], most)
    request = ManagedRequest(0, make_policy("h2o"), Need.NOTHING)
    return Exchange(Swap(name, num_logical, num_keep, [], stored), request, stored, num_keep, 0)


def names(exchanges: list[Exchange], room: Room) -> list[list[str]]:
    return [[each.order.request_id for each in part] for part in in_parts(exchanges, room)]


def test_requests_of_one_shape_share_a_launch():
    alike = [exchange("a", 300), exchange("b", 200), exchange("c", 250)]
    assert names(alike, Room(10_000)) == [["b", "c", "a"]]
    others = [
        exchange("larger region", 300, most=30),
        exchange("larger budget", 300, num_keep=120),
        exchange("few queries", 300, num_logical=NUM_ASKING - 1),
    ]
    assert sorted(names([*alike, *others], Room(10_000))) == [
        ["b", "c", "a"],
        *sorted([e.order.request_id] for e in others),
    ]


def test_a_launch_has_room_for_as_many_as_the_longest_of_it():
    exchanges = [exchange(name, length) for name, length in zip("abcd", (300, 100, 300, 100), strict=True)]
    assert names(exchanges, Room(600)) == [["b", "d"], ["a", "c"]]
    assert names(exchanges, Room(900)) == [["b", "d", "a"], ["c"]]
    assert names(exchanges, Room(10)) == [["b"], ["d"], ["a"], ["c"]]
    assert names(exchanges, Room(600, query=10.0)) == [["b", "d"], ["a"], ["c"]]
    # A protected prompt is held, and not stored.
    protected = [exchange(name, 100, num_keep=300) for name in "ab"]
    assert names(protected, Room(599)) == [["a"], ["b"]]
    assert names(protected, Room(600)) == [["a", "b"]]


def test_of_equal_numbers_the_first_is_the_largest():
    values = torch.tensor([[0.0, 2.0, 0.5, 2.0, 0.5], [0.0, 0.0, 0.0, 1e-30, 0.0]])
    found, place = largest(values, 4)
    assert place.tolist() == [[1, 3, 2, 4], [3, 0, 1, 2]]
    assert torch.equal(found, values.gather(1, place))


def row(*numbers: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).view(1, 1, 1, -1)


def held(is_wanted: torch.Tensor) -> list[int]:
    return is_wanted.flatten().nonzero().flatten().tolist()


def test_what_is_asked_for_comes_before_owners_and_those_by_worth():
    """A region of three, whose owners are tokens 4, 1 and 6 in the order of their worth, of eight stored ones."""
    owner = row(4, 1, 6)
    nothing = torch.zeros(1, 1, 1, 9)
    assert held(best(nothing, owner, 0.5)) == [1, 4, 6]
    asked = nothing.clone()
    asked[..., 2] = 0.6
    assert held(best(asked, owner, 0.5)) == [1, 2, 6]
    # An owner that is asked for too is worth more than the others.
    asked[..., 4] = 0.7
    assert held(best(asked, owner, 0.5)) == [2, 4, 6]
    asked[..., 3] = asked[..., 7] = 0.9
    assert held(best(asked, owner, 0.5)) == [3, 4, 7]


def test_owners_that_were_dropped_are_the_first_to_make_way():
    asked = torch.zeros(1, 1, 1, 9)
    asked[..., 2] = 0.6
    assert held(best(asked, row(4, 8, 6), 0.5)) == [2, 4, 6]
    assert held(best(torch.zeros(1, 1, 1, 9), row(4, 8, 8), 0.5)) == [4]


def test_owners_return_to_their_own_slots():
    owner, wanted = row(4, 1, 6), torch.tensor([2, 6, 7])
    is_wanted = marked(wanted.view(1, 1, 1, -1), 8)
    after = placed(is_wanted, owner, owner)
    assert after.flatten().tolist() == [2, 7, 6]
    # Token 7 stays where it is, and what is no longer wanted makes way.
    assert placed(marked(row(1, 6, 7), 8), owner, after).flatten().tolist() == [7, 1, 6]
    assert placed(marked(row(4, 6, 7), 8), owner, after).flatten().tolist() == [4, 7, 6]
    assert placed(marked(owner, 8), owner, after).equal(owner)


def test_what_is_there_stays_if_too_few_come():
    # The owner of the first slot was dropped; token 5 is in its place.
    owner, present = row(8, 1, 6), row(5, 1, 6)
    assert placed(marked(row(1, 6), 8), owner, present).equal(present)
    assert placed(marked(row(1, 3, 6), 8), owner, present).flatten().tolist() == [3, 1, 6]
    assert placed(marked(row(1, 6), 8), owner, row(8, 1, 6)).flatten().tolist() == [8, 1, 6]


def test_what_a_question_asked_for_is_remembered_until_it_has_been_answered():
    """Evidence does not fall around the end of the prompt, and follows its tokens if earlier ones are dropped."""
    request = ManagedRequest(0, make_policy("h2o"), Need.NOTHING, num_prompt=900)

    def at(num_logical: int, first: int, evidence: list[float]) -> list[float]:
        stored = Stored(first, first, first + len(evidence), [0], 2)
        order, asked = Swap("a", num_logical, 100, [], stored), torch.tensor([[*evidence, 0.0]])
        remember([Exchange(order, request, stored, 100, 0)], asked)
        return [round(each, 2) for each in asked[0].tolist()]

    assert at(892, 0, [0.1, 0.9, 0.3]) == [0.1, 0.9, 0.3, 0.0]
    assert at(899, 0, [0.2, 0.5, 0.3, 0.1]) == [0.2, 0.9, 0.3, 0.1, 0.0]
    assert at(905, 1, [0.5, 0.6, 0.0]) == [0.9, 0.6, 0.1, 0.0]
    assert at(910, 9, [0.5]) == [0.5, 0.0]
    assert at(900 + NUM_ANSWERING, 9, [0.4]) == [0.4, 0.0]
    assert request.question is None
