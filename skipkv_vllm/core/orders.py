"""The orders that the scheduler sends to the workers with a step; they ride on vLLM's `SchedulerOutput`."""

from __future__ import annotations

from typing import NamedTuple


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
        scratch_pages: block ids for tokens that are computed ahead, and for the copy of the cache that this takes, see
            `policies.Probe`; nobody holds them, and other orders of the step do not use them.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_keep: int
    source_pages: list[int]
    target_pages: list[int]
    ordinal: int
    scratch_pages: list[int] = []

    @property
    def num_evicted_before(self) -> int:
        """Tokens evicted by earlier compactions; both sides know it, so the worker can check."""
        return self.num_logical - self.num_resident


class Observation(NamedTuple):
    """An order to the workers: look at the attention of the newest queries. They add it to the mass of the held
    tokens, or note how sparse it is, whichever the request's method needs.

    Attributes:
        request_id: whose cache.
        num_logical: tokens computed so far.
        num_resident: tokens held, in the first slots of `pages`.
        num_queries: queries to look at, the newest; at most as many as the workers keep.
        pages: block ids.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_queries: int
    pages: list[int]


class Strength(NamedTuple):
    """`alpha = min(alpha0 + gamma * N, alpha_max)`; N counts thoughts that are no execution."""

    alpha0: float
    gamma: float
    alpha_max: float


class SteeredRequest(NamedTuple):
    """A request that is steered starts, or starts over after preemption.

    Attributes:
        request_id: its id.
        first: logical position of the first token that may be steered.
        state: of `track_thoughts`, before that token.
        strength: its coefficients.
    """

    request_id: str
    first: int
    state: list[int]
    strength: Strength


class Started(NamedTuple):
    """A request whose cache is managed starts, or starts over after preemption.

    Attributes:
        request_id: its id.
        policy: name of its method.
        num_prompt: prompt length.
        protected: prompt tokens that must survive.
        first_tracked: logical position from which its sentences are tracked.
        num_task: last tokens of the prompt that are its question, where the request says so itself; else 0.
    """

    request_id: str
    policy: str
    num_prompt: int
    protected: int
    first_tracked: int
    num_task: int = 0


class StepOrders(NamedTuple):
    """Orders of one step. The worker first forgets the requests that vLLM reports finished or preempted,
    then observes, then compacts, then starts; all before anything else of the step touches the cache.

    `records_queries` says whether a query of this step will be needed: those of the last W tokens before a compaction
    are, and most steps have none of them. `steered` are the requests whose steering starts or starts over.
    """

    compactions: list[Compaction]
    started: list[Started]
    observations: list[Observation] = []
    records_queries: bool = True
    steered: list[SteeredRequest] = []
