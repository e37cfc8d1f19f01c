"""The planner: when and how many, from token counts alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.core.limits import Limits, RecallLimits, ceil_div
from skipkv_vllm.core.needs import NUM_ASKING
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.scheduler.planner import AccumulationSchedule, EvictionPlanner, PlannedCompaction

LIMITS = Limits(budget=100, buffer=16, window=8, protected=0)


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (48, 16, 3)])
def test_ceil_div(a, b, expected):
    assert ceil_div(a, b) == expected


def test_limits_of_a_short_prompt():
    limits = Limits(budget=100, buffer=16, window=8, protected=40)
    assert (limits.keep, limits.bound, limits.first_bound) == (100, 116, 116)


def test_a_protected_prompt_longer_than_the_budget_raises_the_bound():
    limits = Limits(budget=100, buffer=16, window=8, protected=300)
    assert (limits.keep, limits.bound) == (308, 324)


def test_prompt_plus_window_counts_from_the_budget_on():
    assert Limits(budget=100, buffer=1, window=8, protected=92).keep == 100
    assert Limits(budget=100, buffer=1, window=8, protected=93).keep == 101


def test_compacts_at_the_bound_and_not_before():
    planner = EvictionPlanner(LIMITS)
    assert planner.due(115, 0) is None
    assert planner.due(116, 0) == PlannedCompaction(116, 100, 0)


@pytest.mark.parametrize(("num_prompt", "first"), [(50, 116), (108, 116), (109, 117), (400, 408)])
def test_a_deferred_prompt_is_held_until_its_window_is_written(num_prompt, first):
    limits = Limits(budget=100, buffer=16, window=8, protected=0, deferred=num_prompt + 8)
    assert (limits.first_bound, limits.cacheable) == (first, first - 8)
    planner = EvictionPlanner(limits)
    assert planner.room(0, 0) == first
    assert planner.due(first - 1, 0) is None
    assert planner.due(first, 0) == PlannedCompaction(first, 100, 0)
    planner.committed(first)
    # From then on it is a request like any other, until it is preempted.
    assert planner.bound == 116
    assert planner.due(first + 15, first - 100) is None
    assert planner.due(first + 16, first - 100) == PlannedCompaction(116, 100, 0)
    planner.restart()
    assert planner.bound == first


@pytest.mark.parametrize("num_prompt", [100, 101, 115, 116, 117, 150])
@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_prompt_longer_than_the_budget_can_be_compacted_at_its_end(num_prompt, is_deferred):
    limits = Limits(100, 16, 8, 0, deferred=num_prompt if is_deferred else 0, prompt_end=num_prompt)
    planner = EvictionPlanner(limits)
    for _ in range(2):
        # It was preempted and has written 60 tokens; its text is computed again in chunks of at most 40.
        num_logical = num_evicted = 0
        at = []
        while num_logical < num_prompt + 60:
            if num_logical >= planner.earliest:
                plan = planner.due(num_logical, num_evicted)
                assert plan is not None
                at.append(num_logical)
                assert plan.num_resident == num_logical - num_evicted <= limits.first_bound
                num_evicted += plan.num_resident - plan.num_keep
                planner.committed(num_logical)
                # A step that does not run the request must not compact it again.
                assert planner.due(num_logical, num_evicted) is None
            num_logical += min(40, planner.room(num_logical, num_evicted))
        if num_prompt == 100:
            first = [116]
        elif num_prompt <= 116 or is_deferred:
            first = [num_prompt]
        else:
            first = [*range(116, num_prompt, 16), num_prompt]
        assert limits.cacheable == first[0] - 8
        assert at[: len(first)] == first
        assert at[len(first) :] == list(range(first[-1] + 16, num_prompt + 60, 16))
        planner.restart()


def test_tokens_are_decoded_ahead_at_the_end_of_a_prompt_and_never_else():
    planner = EvictionPlanner(Limits(100, 16, 8, 0, prompt_end=140, num_draft=5))
    assert planner.due(116, 0) == PlannedCompaction(116, 100, 0, 0)
    assert planner.due(140, 24) == PlannedCompaction(116, 100, 0, 105)
    assert planner.due(156, 40) == PlannedCompaction(116, 100, 0, 0)
    planner = EvictionPlanner(Limits(100, 16, 8, 0, prompt_end=100, num_draft=5))
    assert planner.due(116, 0) == PlannedCompaction(116, 100, 0, 0)


def test_a_question_is_appended_before_the_end_of_a_prompt_and_not_at_it():
    planner = EvictionPlanner(Limits(100, 16, 8, 0, prompt_end=140, num_question=7))
    assert planner.due(116, 0) == PlannedCompaction(116, 100, 0, 7)
    assert planner.due(139, 23) == PlannedCompaction(116, 100, 0, 7)
    assert planner.due(140, 24) == PlannedCompaction(116, 100, 0, 0)
    assert planner.due(156, 40) == PlannedCompaction(116, 100, 0, 0)


def test_counts_resident_not_logical_tokens():
    planner = EvictionPlanner(LIMITS)
    assert planner.due(1015, 900) is None
    assert planner.due(1016, 900) == PlannedCompaction(116, 100, 0)


def test_a_request_beyond_its_bound_is_compacted_to_the_budget_all_the_same():
    # A long unprotected prompt, or a compaction that had to wait.
    planner = EvictionPlanner(LIMITS)
    assert planner.due(5000, 0) == PlannedCompaction(5000, 100, 0)


def test_a_request_without_limits_keeps_everything():
    planner = EvictionPlanner(None)
    assert planner.due(10**6, 0) is None
    assert planner.bound is None
    assert planner.room(10**6, 0) > 10**6
    assert planner.accumulate(90, moves_tokens=False) == 0
    planner.restart()
    assert min(planner.earliest, planner.queries_from) > 10**6


def test_a_request_takes_no_more_from_the_prefix_cache_than_leaves_a_window_to_compute():
    assert LIMITS.cacheable == 108
    assert Limits(budget=100, buffer=16, window=8, protected=300).cacheable == 316


def test_a_protected_prompt_stays_whole():
    assert EvictionPlanner(Limits(20, 4, 8, 50)).due(62, 0) == PlannedCompaction(62, 58, 50)
    assert EvictionPlanner(Limits(20, 4, 8, 50)).due(61, 0) is None


def test_planning_changes_nothing_until_it_is_committed():
    planner = EvictionPlanner(LIMITS)
    first = planner.due(116, 0)
    assert planner.due(116, 0) == first
    assert planner.num_compactions == 0
    planner.committed(116)
    assert planner.num_compactions == 1


@pytest.mark.parametrize("limits", [LIMITS, Limits(100, 16, 8, 0, prompt_end=116)])
def test_a_request_is_not_compacted_at_its_end(limits):
    """With asynchronous scheduling it still runs there, while its last token is in flight."""
    planner = EvictionPlanner(limits, AccumulationSchedule(49, 8, every_query=True), end=132)
    assert planner.due(116, 0) is not None
    planner.committed(116)
    assert planner.due(132, 16) is None
    assert min(planner.earliest, planner.queries_from) > 10**6
    planner.restart()
    assert planner.due(116, 0) is not None
    assert EvictionPlanner(limits, end=116).due(116, 0) is None


def test_starting_over_forgets_counts():
    planner = EvictionPlanner(LIMITS, AccumulationSchedule(49, LIMITS.window, every_query=True))
    planner.accumulate(116, moves_tokens=True)
    planner.committed(116)
    planner.restart()
    assert planner.num_compactions == 0
    assert planner.earliest == 116
    assert planner.due(116, 0) == PlannedCompaction(116, 100, 0)
    assert planner.accumulate(57, moves_tokens=False) == 8


def test_a_chunk_ends_at_the_bound():
    planner = EvictionPlanner(LIMITS)
    assert planner.room(0, 0) == 116
    assert planner.room(100, 0) == 16
    assert planner.room(1000, 900) == 16


def test_a_chunk_is_no_longer_than_its_queries_are_kept_where_they_are_counted():
    planner = EvictionPlanner(LIMITS, AccumulationSchedule(49, LIMITS.window, every_query=True))
    assert planner.room(0, 0) == 57
    assert planner.room(50, 0) == 7
    assert planner.accumulate(57, moves_tokens=False) == 8
    assert planner.room(57, 0) == 8


def test_orders_say_what_was_evicted_before():
    order = Compaction("a", 500, 116, 100, [1, 2], [1], 3)
    assert order.num_evicted_before == 384


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(10, 60),
    buffer=st.integers(1, 20),
    window=st.integers(1, 8),
    prompt=st.integers(1, 300),
    protects=st.booleans(),
    counts_attention=st.booleans(),
    interval=st.sampled_from([8, 32]),
    chunks=st.lists(st.integers(1, 100), min_size=1),
)
def test_a_request_is_compacted_at_the_same_tokens_however_its_text_is_cut(
    budget, buffer, window, prompt, protects, counts_attention, interval, chunks
):
    """And never exceeds its bound, and every query from the first that counts on is counted."""
    limits = Limits(budget, buffer, window, prompt if protects else 0)
    first = min(prompt - 1, limits.bound - buffer)
    schedule = AccumulationSchedule(first, interval, every_query=True)
    planner = EvictionPlanner(limits, schedule if counts_attention else None)
    logical, evicted, counted, compacted_at = 0, 0, 0, []
    total = prompt + 3 * buffer
    while logical < total:
        due = planner.due(logical, evicted)
        counted += planner.accumulate(logical, moves_tokens=due is not None)
        if due is not None:
            assert (due.num_resident, due.num_keep) == (limits.bound, limits.keep)
            assert due.num_keep >= limits.protected + window
            assert not counts_attention or first + counted == logical
            evicted += due.num_resident - due.num_keep
            planner.committed(logical)
            compacted_at.append(logical)
        logical += min(chunks[logical % len(chunks)], total - logical, planner.room(logical, evicted))
        assert logical - evicted <= limits.bound
        assert not counts_attention or logical - first - counted <= interval
    assert compacted_at == list(range(limits.bound, total, buffer))
    assert planner.num_compactions == len(compacted_at)


def test_attention_is_counted_every_window_and_before_a_compaction():
    planner = EvictionPlanner(LIMITS, AccumulationSchedule(49, LIMITS.window, every_query=True))
    counted = {n: planner.accumulate(n, moves_tokens=n == 61) for n in range(50, 72)}
    assert {n: count for n, count in counted.items() if count} == {57: 8, 61: 4, 69: 8}
    assert planner.accumulate(71, moves_tokens=True) == 2
    assert planner.accumulate(71, moves_tokens=True) == 0


def test_attention_is_looked_at_by_segment_whatever_is_compacted():
    planner = EvictionPlanner(LIMITS, AccumulationSchedule(50, 32, every_query=False))
    assert planner.room(0, 0) == 82
    looks = {n: planner.accumulate(n, moves_tokens=n in (70, 114)) for n in range(51, 130)}
    assert {n: count for n, count in looks.items() if count} == {82: 8, 114: 8}
    assert planner.room(116, 16) == 16
    planner.restart()
    assert planner.accumulate(82, moves_tokens=False) == 8


def test_no_more_queries_are_counted_than_are_kept():
    planner = EvictionPlanner(LIMITS, AccumulationSchedule(49, LIMITS.window, every_query=True))
    assert planner.accumulate(90, moves_tokens=False) == 8


def test_attention_is_counted_only_where_somebody_reads_it():
    planner = EvictionPlanner(LIMITS)
    assert planner.accumulate(90, moves_tokens=True) == 0


@given(
    budget=st.integers(10, 60),
    buffer=st.integers(1, 20),
    delays=st.lists(st.integers(0, 5), max_size=6),
)
def test_a_request_is_due_from_its_earliest_length_on_and_its_queries_are_there(budget, buffer, delays):
    """Also after compactions that had to wait. A step of one token records its query if it may be needed."""
    evicted, waits, window = 0, list(delays), 4
    planner = EvictionPlanner(Limits(budget, buffer, window, 0))
    recorded = set()
    for logical in range(1, 400):
        if logical > planner.queries_from:
            recorded.add(logical - 1)
        due = planner.due(logical, evicted)
        assert (due is not None) == (logical >= planner.earliest)
        if due is None:
            continue
        assert recorded.issuperset(range(logical - window, logical))
        if waits and waits[0]:
            waits[0] -= 1
            continue
        waits = waits[1:]
        evicted += due.num_resident - due.num_keep
        planner.committed(logical)
    assert len(recorded) < 400 or buffer <= window


SWAPPED = Limits(budget=100, buffer=64, window=8, protected=0, recall=RecallLimits(0.25, 24, num_prompt=300))


def swap_points(limits: Limits, length: int, chunk: int, end: int = 10**6) -> tuple[list[int], list[int]]:
    """Return where a request is compacted and where its tokens are swapped."""
    planner = EvictionPlanner(limits, end=end)
    num_logical = num_evicted = 0
    compactions, swaps = [], []
    while num_logical < length:
        if num_logical >= planner.earliest:
            plan = planner.due(num_logical, num_evicted)
            if plan is not None:
                compactions.append(num_logical)
                num_evicted += plan.num_resident - plan.num_keep
                planner.committed(num_logical)
            elif planner.swaps(num_logical):
                swaps.append(num_logical)
        assert not planner.swaps(num_logical)
        num_logical += min(chunk, planner.room(num_logical, num_evicted))
    return compactions, swaps


def test_tokens_are_swapped_at_the_end_of_the_prompt_and_at_intervals():
    compactions, swaps = swap_points(SWAPPED, 500, chunk=64)
    assert compactions == [164, 228, 292, 356, 420, 484]
    # One at 420 would be one with the compaction.
    # 292 is 8 tokens before the end of the prompt.
    assert swaps == [296, 299, 324, 348, 372, 396, 444, 468, 492]


@given(st.integers(1, 200), st.integers(20, 400), st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_swaps_do_not_depend_on_chunks(chunk, num_prompt, interval):
    limits = Limits(100, 64, 8, 0, recall=RecallLimits(0.25, interval, num_prompt))
    assert swap_points(limits, 600, chunk) == swap_points(limits, 600, 1)


def test_nothing_is_swapped_before_a_compaction_or_where_no_token_may_come_back():
    assert swap_points(SWAPPED, 164, chunk=1)[1] == []
    assert swap_points(Limits(100, 64, 8, 0), 500, chunk=64)[1] == []
    protected = Limits(100, 64, 8, 400, recall=RecallLimits(0.25, 24, num_prompt=400))
    assert protected.num_recalled == 0
    assert swap_points(protected, 700, chunk=64)[1] == []


def test_nothing_is_swapped_where_no_further_token_is_computed():
    assert swap_points(SWAPPED, 444, chunk=64, end=444)[1] == [296, 299, 324, 348, 372, 396]


def test_queries_are_recorded_before_a_swap():
    planner = EvictionPlanner(SWAPPED)
    assert planner.queries_from == 164 - NUM_ASKING
    planner.committed(164)
    planner.committed(228)
    assert (planner.earliest, planner.queries_from) == (292, 292 - NUM_ASKING)
    planner.committed(292)
    assert (planner.earliest, planner.queries_from) == (296, 296 - NUM_ASKING)
