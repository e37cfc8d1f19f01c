"""What the scheduler tells the workers in a step; rides on vLLM's `SchedulerOutput`."""

from __future__ import annotations

from typing import NamedTuple

from ..steering.controller import SteeredRequest
from .planner import Compaction, Observation


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
