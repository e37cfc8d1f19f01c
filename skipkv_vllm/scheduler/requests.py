"""The record of a request in the scheduler's process, and the interface of listeners that follow requests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config import ResolvedRequest
from ..core.limits import Demand
from ..core.needs import ACCUMULATED, Need
from ..core.orders import Compaction, Started, SteeredRequest, Swap
from ..steering.controller import Thoughts
from .admission import Promise
from .planner import AccumulationSchedule, EvictionPlanner


@dataclass
class RequestEvictions:
    """The evictions of one request; its client reads them as `kv_transfer_params["skipkv"]` of the response.

    Attributes:
        policy: the method that was applied.
        compactions: number of compactions since the request last started.
        evicted_tokens: tokens that these evicted.
        lives: number of starts: one, and one more after each preemption, which frees all its KV.
    """

    policy: str
    compactions: int = 0
    evicted_tokens: int = 0
    lives: int = 1


@dataclass(slots=True)
class RequestRecord:
    """The state of one request in the scheduler's process, beside vLLM's own `Request`.

    `EvictionController` makes a record when a request arrives and drops it when the request ends.

    Attributes:
        request_id: its id.
        resolved: the settings that apply to it.
        demand: the most it may need.
        planner: when it is compacted.
        is_managed: whether the workers keep state for it, because it may be compacted or is traced.
        most_cached: tokens it may take from the prefix cache, a multiple of the block size.
        steering: where and how its steering starts; None if it is not steered.
        thoughts: thoughts of a steered request that ended; else None.
        evictions: its evictions; None before its first start and if it keeps everything.
        recomputes_sentences: whether it leaves cached tokens of its prompt unused so that the workers can find their
            sentences.
        promise: blocks it was promised. The block manager sets this and the next two fields; the promise is None while
            the request holds no blocks.
        num_evicted: tokens that are no longer held.
        num_intact: leading blocks that were never written to, once it is compacted; else None.
        num_decoding: steps planned since its prompt was scheduled whole; counted while blocks of a prompt in flight are
            promised.
        num_postponed: steps for which its compaction has been due and the request has waited; 0 if none is due.
    """

    request_id: str
    resolved: ResolvedRequest
    demand: Demand
    planner: EvictionPlanner
    is_managed: bool
    most_cached: int
    steering: SteeredRequest | None = None
    thoughts: Thoughts | None = None
    evictions: RequestEvictions | None = None
    recomputes_sentences: bool = False
    promise: Promise | None = None
    num_evicted: int = 0
    num_intact: int | None = None
    num_decoding: int = 0
    num_postponed: int = 0

    @classmethod
    def make(
        cls,
        request_id: str,
        resolved: ResolvedRequest,
        demand: Demand,
        *,
        end: int,
        num_queries: int,
        block_size: int,
        is_traced: bool = False,
    ) -> RequestRecord:
        """Make the record of a request that arrives.

        Args:
            request_id: its id.
            resolved: the settings that apply to it.
            demand: the most it may need.
            end: logical length beyond which it computes no token.
            num_queries: newest queries that the workers keep of each request.
            block_size: tokens of a block.
            is_traced: whether a trace is written of requests that may evict.
        """
        schedule = accumulation_schedule(resolved, num_queries)
        planner = EvictionPlanner(resolved.limits, schedule, end)
        is_managed = resolved.limits is not None and (is_traced or not planner.is_done)
        most_cached = most_cached_tokens(resolved, schedule) // block_size * block_size if is_managed else sys.maxsize
        return cls(request_id, resolved, demand, planner, is_managed, most_cached)

    def limit_cached(self, num_cached: int) -> int:
        """Return how many of the cached tokens found for it the request may take, and note if it leaves some."""
        if num_cached <= self.most_cached:
            return num_cached
        limits = self.resolved.limits
        if limits is not None and self.resolved.needs & Need.SENTENCES and not limits.protected:
            self.recomputes_sentences = True
        return self.most_cached


def accumulation_schedule(resolved: ResolvedRequest, num_queries: int) -> AccumulationSchedule | None:
    """Return which queries the workers accumulate for a request; None if its method needs no accumulation."""
    limits, needs = resolved.limits, resolved.needs
    if limits is None:
        return None
    if needs & Need.SEGMENTS:
        return AccumulationSchedule(limits.protected, resolved.policy.segment_options.length, every_query=False)
    if needs & ACCUMULATED:
        # From the prompt's last token on, or from as many before the first compaction as between two.
        first = min(resolved.num_prompt - 1, limits.first_bound - limits.buffer)
        return AccumulationSchedule(first, num_queries, every_query=True)
    return None


def most_cached_tokens(resolved: ResolvedRequest, schedule: AccumulationSchedule | None) -> int:
    """Return how many tokens a request may take from the prefix cache; the workers must compute the others."""
    limits = resolved.limits
    if limits is None:
        return sys.maxsize
    most = limits.cacheable
    if resolved.needs & Need.SENTENCES:
        # Workers find sentences while they compute a token, so they compute every token that may be evicted.
        most = min(most, limits.protected)
    return most if schedule is None else min(most, schedule.first)


class Text(NamedTuple):
    """Token ids of a request that ended; the prompt is empty if it was given as embeddings."""

    prompt: Sequence[int]
    output: Sequence[int]


class RequestListener:
    """Follows the requests of a scheduler. Every method does nothing unless a subclass overrides it.

    For each request the scheduler calls `arrived` once, `started` when its first token is scheduled and again after
    each preemption, `compacted` and `swapped` for each compaction and swap that is sent to the workers, and `finished`
    once. A request that is aborted while it waits is finished without having started.
    """

    def arrived(self, request: RequestRecord, prompt: Sequence[int]) -> None:
        """Handle the arrival of a request; `prompt` is empty if it was given as embeddings."""

    def started(self, request: RequestRecord, order: Started) -> None:
        """Handle the start of a request that may be compacted, also after a preemption."""

    def compacted(self, request: RequestRecord, order: Compaction) -> None:
        """Handle a compaction that is sent to the workers."""

    def swapped(self, request: RequestRecord, order: Swap) -> None:
        """Handle a swap that is sent to the workers."""

    def finished(self, request: RequestRecord, text: Text) -> None:
        """Handle the end of a request, also if it was aborted."""

    def before_report(self) -> None:
        """Prepare for the next report to the metrics."""

    def idle(self) -> None:
        """Handle the end of the last request."""

    def close(self) -> None:
        """Handle the shutdown of the scheduler."""
