"""When the scheduler compacts a request and accumulates attention; the only place that calls planners."""

from __future__ import annotations

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.core.needs import FROM_RECENT_QUERIES, Need
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.scheduler.planner import AccumulationSchedule, EvictionPlanner
from tests.simulation.request import Running


class Planning:
    """The scheduler's decisions.

    Args:
        config: the server's policy.
    """

    def __init__(self, config: KVPolicyConfig) -> None:
        self._config = config

    def start(self, request: Running) -> None:
        """Plan for a managed request from now on."""
        config = self._config
        limits = Limits(
            request.budget, config.kv_buffer, config.kv_window, request.protected, prompt_end=self.prompt_end(request)
        )
        first = max(request.num_logical, request.num_prompt - 1)
        schedule = AccumulationSchedule(first, config.num_queries, every_query=True)
        if config.needs & Need.SEGMENTS:
            length = config.policy.segment_options.length
            schedule = AccumulationSchedule(request.protected, length, every_query=False)
        request.planner = EvictionPlanner(limits, schedule)

    def keep(self, request: Running) -> int:
        """Return the tokens left by a compaction."""
        return max(request.budget, request.protected + self._config.kv_window)

    def prompt_end(self, request: Running) -> int:
        """Return the length of a prompt that is compacted as soon as it is computed, else 0."""
        return request.num_prompt if self._config.policy.compacts_prompt else 0

    def is_due(self, request: Running) -> bool:
        """Whether a request is compacted before the next step."""
        keep = self.keep(request)
        due = request.num_resident >= keep + self._config.kv_buffer or (
            self.prompt_end(request) == request.num_logical and request.num_resident > keep
        )
        enough = sum(q is not None for q in request.queries) >= self._config.kv_window
        # Most methods are tested on answers; the part of a prompt that comes from another request has no queries.
        started = request.num_logical >= request.num_prompt or self._config.policy.compacts_prompt
        return request.managed and due and enough and started

    def accumulate(self, request: Running, *, is_compacted: bool) -> int:
        """Return how many of the newest queries a request accumulates before the next step."""
        if not self._config.needs & FROM_RECENT_QUERIES:
            return 0
        if request.num_logical < request.num_prompt and not self._config.needs & Need.SEGMENTS:
            return 0
        return request.planner.accumulate(request.num_logical, is_compacted)

    def records_queries(self, lengths: list[tuple[Running, int]]) -> bool:
        """Whether the step that brings requests to these lengths records queries.

        Decided as the scheduler does, so that tests notice a missing query.
        """
        return bool(self._config.needs & FROM_RECENT_QUERIES) or any(
            length > request.planner.queries_from for request, length in lengths
        )

    def committed(self, request: Running, order: Compaction) -> None:
        """Note that a compaction of a request was ordered."""
        request.planner.committed(order.num_logical)
