"""Room for evicted tokens in host memory, by counts alone."""

from __future__ import annotations

import random

import pytest

from skipkv_vllm.core.limits import STORED_PAGE, Limits, RecallLimits, ceil_div
from skipkv_vllm.core.orders import Stored
from skipkv_vllm.scheduler.store import TokenStore

RECALL = RecallLimits(share=0.25, interval=32, num_prompt=50)
LIMITS = Limits(budget=100, buffer=16, window=8, protected=40, recall=RECALL)


def compact(store: TokenStore, request_id: str, num_logical: int, limits: Limits = LIMITS) -> Stored | None:
    """Make room for a request, and return what it has then."""
    store.compact(request_id, limits, num_logical)
    return store.stored(request_id, copies=True)


def test_every_token_behind_the_protected_prompt_is_stored_once():
    store = TokenStore(8)
    assert compact(store, "a", 116) == Stored(40, 40, 116, [0, 1], 13)
    assert store.stored("a", copies=False) == Stored(40, 116, 116, [0, 1], 13)
    assert compact(store, "a", 180) == Stored(40, 116, 180, [0, 1, 2], 13)
    assert (store.num_used, store.num_dropped) == (3, 0)
    store.forget("a")
    assert store.num_used == 0


def test_a_request_whose_limits_let_nothing_come_back_takes_no_page():
    store = TokenStore(8)
    assert compact(store, "a", 424, Limits(100, 16, 8, 400, recall=RECALL)) is None
    assert compact(store, "b", 116, Limits(100, 16, 8, 0)) is None
    assert store.num_used == 0


def test_the_request_with_most_pages_loses_its_first_one():
    store = TokenStore(4)
    store.compact("large", LIMITS, 40 + 3 * STORED_PAGE)
    assert compact(store, "small", 40 + STORED_PAGE).pages == [3]
    assert compact(store, "other", 40 + STORED_PAGE).pages == [0]
    end = 40 + 3 * STORED_PAGE
    assert store.stored("large", copies=True) == Stored(40 + STORED_PAGE, 40 + STORED_PAGE, end, [1, 2], 13)
    assert store.num_dropped == STORED_PAGE


def test_a_request_alone_keeps_the_newest_of_more_tokens_than_there_is_room_for():
    store = TokenStore(2)
    store.compact("a", LIMITS, 40 + 2 * STORED_PAGE)
    stored = compact(store, "a", 40 + 5 * STORED_PAGE + 1)
    assert stored.end - stored.first <= 2 * STORED_PAGE
    assert stored.begin == max(stored.first, 40 + 2 * STORED_PAGE)
    assert stored.end == 40 + 5 * STORED_PAGE + 1
    assert len(set(stored.pages)) == 2


def test_a_request_may_lose_all_its_tokens():
    store = TokenStore(1)
    store.compact("a", LIMITS, 40 + 10)
    store.compact("b", LIMITS, 40 + 20)
    assert store.stored("a", copies=True) is None
    assert store.num_tokens == 20
    assert store.num_dropped == 10
    # What it computes from now on may be stored again.
    assert compact(store, "a", 50 + STORED_PAGE) == Stored(50, 50, 50 + STORED_PAGE, [0], 13)
    assert store.stored("b", copies=False) is None
    store.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_requests_lose_no_page(seed):
    chance, store = random.Random(seed), TokenStore(20)
    lengths: dict[str, int] = {}
    for number in range(600):
        request_id = chance.choice([*lengths, str(number)])
        if chance.random() < 0.2:
            store.forget(request_id)
            lengths.pop(request_id, None)
            continue
        before = lengths.get(request_id, LIMITS.protected)
        lengths[request_id] = before + chance.randrange(1, 300)
        stored = compact(store, request_id, lengths[request_id])
        assert stored.begin == max(before, stored.first)
        assert stored.end == lengths[request_id]
        assert len(stored.pages) == len(set(stored.pages)) == ceil_div(stored.num_tokens, STORED_PAGE)
        store.check_integrity()
    for request_id in lengths:
        store.forget(request_id)
    assert store.num_used == 0
