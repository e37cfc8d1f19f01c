"""Drafts of speculative decoding: whatever is accepted, a request is compacted and measured at the same tokens."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.core.limits import Limits
from skipkv_vllm.scheduler.planner import AccumulationSchedule, EvictionPlanner


class Run(NamedTuple):
    """What a request did.

    Attributes:
        compactions: tokens computed at each compaction.
        accumulations: likewise at each accumulation, with the number of queries.
        num_steps: steps that computed a token.
    """

    compactions: list[int]
    accumulations: list[tuple[int, int]]
    num_steps: int


def run(planner: EvictionPlanner, prompt: int, end: int, accepted: list[int], *, drafts: int, is_async: bool) -> Run:
    """Decode from the prompt's last token on.

    Args:
        planner: of the request.
        prompt: its tokens, computed before.
        end: tokens at which it has ended.
        accepted: drafts that are right in one step after the other.
        drafts: tokens drafted for each step.
        is_async: whether a step is planned before the drafts of the last one are verified.
    """
    counted, evicted, found = prompt, 0, Run([], [], 0)
    num_steps = 0
    rejected: list[int] = []
    """drafts of each step in flight that will turn out to be wrong"""
    while True:
        if not is_async or len(rejected) > 1:
            counted -= rejected.pop(0) if rejected else 0
        if counted - sum(rejected) >= end:
            return found._replace(num_steps=num_steps)
        plan = planner.due(counted, evicted)
        num_queries = planner.accumulate(counted, plan is not None)
        exact = counted - sum(rejected)
        if plan is not None:
            assert counted == exact, "compacted while drafts are unverified"
            found.compactions.append(counted)
            evicted += plan.num_resident - plan.num_keep
            planner.committed(counted)
        if num_queries:
            assert counted == exact, "measured while drafts are unverified"
            found.accumulations.append((counted, num_queries))
        scheduled = planner.without_drafts_beyond(
            counted, evicted, num_new=1 + drafts, num_known=1, are_verified=not is_async
        )
        if not scheduled:
            assert rejected, "nothing goes on"
            counted -= rejected.pop(0)
            continue
        num_accepted = min(accepted[num_steps % len(accepted)], scheduled - 1)
        counted += scheduled
        rejected.append(scheduled - 1 - num_accepted)
        num_steps += 1
        assert counted - evicted <= (planner.bound or counted)


@settings(max_examples=300, deadline=None)
@given(
    budget=st.integers(20, 60),
    buffer=st.integers(5, 40),
    prompt=st.integers(1, 70),
    new=st.integers(1, 250),
    drafts=st.integers(1, 4),
    accepted=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    interval=st.sampled_from([None, 8, 32]),
    is_async=st.booleans(),
)
def test_whatever_is_accepted_counts_are_those_without_drafts(
    budget, buffer, prompt, new, drafts, accepted, interval, is_async
):
    limits = Limits(budget, buffer, window=8, protected=prompt)
    end = prompt + new

    def planner() -> EvictionPlanner:
        schedule = None if interval is None else AccumulationSchedule(prompt - 1, interval, every_query=True)
        return EvictionPlanner(limits, schedule, end)

    plain = run(planner(), prompt, end, [0], drafts=0, is_async=False)
    found = run(planner(), prompt, end, accepted, drafts=drafts, is_async=is_async)
    assert (found.compactions, found.accumulations) == (plain.compactions, plain.accumulations)
    assert found.num_steps <= plain.num_steps


def test_drafts_end_at_the_bound_or_before_it():
    planner = EvictionPlanner(Limits(budget=100, buffer=16, window=8, protected=0))
    numbers = {"num_new": 5, "num_known": 1}
    assert planner.without_drafts_beyond(110, 0, **numbers, are_verified=False) == 5
    assert planner.without_drafts_beyond(111, 0, **numbers, are_verified=True) == 5
    assert planner.without_drafts_beyond(111, 0, **numbers, are_verified=False) == 4
    assert planner.without_drafts_beyond(114, 0, **numbers, are_verified=True) == 2
    assert planner.without_drafts_beyond(114, 0, **numbers, are_verified=False) == 1
    assert planner.without_drafts_beyond(115, 0, **numbers, are_verified=False) == 1


def test_a_request_that_is_never_compacted_keeps_its_drafts():
    for planner in (EvictionPlanner(None), EvictionPlanner(Limits(100, 16, 8, 0), end=110)):
        assert planner.without_drafts_beyond(109, 0, num_new=5, num_known=1, are_verified=False) == 5


def test_a_chunk_of_known_tokens_ends_at_the_bound():
    planner = EvictionPlanner(Limits(budget=100, buffer=16, window=8, protected=0))
    assert planner.without_drafts_beyond(100, 0, num_new=64, num_known=80, are_verified=False) == 16
