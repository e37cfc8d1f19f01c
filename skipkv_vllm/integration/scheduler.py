"""vLLM's schedulers with eviction: they plan compactions before each step and send the orders with it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from ..banner import banner
from ..capacity import capacity, most_rows
from ..config import KEEP_EVERYTHING, KVPolicyConfig, RequestOptions
from ..core.auxiliary import auxiliary
from ..core.limits import STORED_PAGE
from ..scheduler.admission import Ledger
from ..scheduler.eviction import EvictionController
from ..scheduler.listeners import client_report
from ..scheduler.requests import RequestRecord, Text
from ..scheduler.stats import EvictionStats
from ..scheduler.store import TokenStore
from . import compat
from .block_manager import EvictingBlockManager
from .free_queue import GuardQueue
from .listeners import make_listeners
from .waiting_queue import PrefillLengthQueue

logger = init_logger("vllm.skipkv")

# The mixin overrides methods of either scheduler; for the type checker it is one.
if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class EvictionMixin(_Base):
    """Overrides of vLLM's scheduler; `EvictionController` makes the decisions.

    Attributes:
        kv_policy: configuration of the server.
        block_manager: vLLM's block manager with eviction.
        eviction: the controller, with the records of all requests.
    """

    kv_policy: KVPolicyConfig
    block_manager: EvictingBlockManager
    eviction: EvictionController

    _pause_state: PauseState
    prefill_capacity_bound: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.kv_policy = compat.policy_config(self.vllm_config)
        groups = self._groups = compat.cache_groups(self.vllm_config, self.kv_cache_config.kv_cache_groups)
        pool = compat.block_pool(self.vllm_config, groups, self.kv_cache_config.num_blocks)
        self._draft_slots = pool.draft_slots
        # Without eviction a request may reach its longest length; promising that would admit fewer than stock vLLM.
        is_bounded = config.kv_admission == "bounded" and config.evicts
        requests: dict[str, RequestRecord] = {}
        ledger = Ledger(pool.num_blocks, pool.block_size, is_bounded, most_rows(config, pool))
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.block_manager = EvictingBlockManager.adopt(managers, groups.evicting, requests, ledger)
        compat.check_bound_fits(config, pool)
        stats = EvictionStats()
        listeners = make_listeners(self.vllm_config, config, self.block_manager.block_size, stats)
        num_stored = compat.stored_pages(self.vllm_config, groups) if config.recalls else 0
        self.eviction = EvictionController(
            *(config, requests, self.block_manager, stats, listeners),
            num_draft_slots=pool.num_draft_slots,
            store=TokenStore(num_stored) if num_stored else None,
        )
        compat.check_drafter(self)
        self._has_preempted = False
        if config.kv_batch_grouping != "off":
            self.waiting = PrefillLengthQueue(
                config.kv_grouping_width,
                config.kv_grouping_max_wait,
                by_priority=self.policy is SchedulingPolicy.PRIORITY,
            )
        if config.kv_prefix_eviction == "guard":
            blocks = self.kv_cache_manager.block_pool
            blocks.free_block_queue = GuardQueue.adopt(blocks.free_block_queue)
        with auxiliary("print the banner"):
            found = capacity(config, compat.model_shape(self.vllm_config, groups), pool) if config.evicts else None
            is_async = isinstance(self, AsyncScheduler)
            for line in banner(config, found, self.max_model_len, num_stored * STORED_PAGE, is_async=is_async):
                logger.info(line)

    # ---- a request arrives

    def add_request(self, request: Request) -> None:
        # A streaming-input session adds each part of its input.
        if request.request_id not in self.requests:
            self._arrive(request)
        super().add_request(request)

    def _arrive(self, request: Request) -> None:
        """Settle how many tokens and blocks a new request may hold, before any token of it is scheduled."""
        options, longest = KEEP_EVERYTHING, self.max_model_len
        if request.resumable:
            # A session that grows its prompt rewrites tokens and hashes.
            self.eviction.stats.skipped("streaming_input")
        elif request.sampling_params is not None:
            given = request.sampling_params.extra_args
            options = RequestOptions.parse(given, self.kv_policy, self.max_model_len, check_names=False)
            longest = min(request.num_prompt_tokens + request.max_tokens, longest)
        resolved = options.resolve(self.kv_policy, request.num_prompt_tokens)
        demand = resolved.demand(longest, self.block_manager.block_size, self._groups.others, self._draft_slots)
        num_blocks = self.block_manager.ledger.num_blocks - demand.num_beside - demand.num_in_flight
        slots = num_blocks * self.block_manager.block_size
        room = slots - self._draft_slots.number
        if demand.num_tokens > slots:
            # The API server refuses such requests, but with data parallelism it knows the mean of the pools only.
            logger.warning(
                "SkipKV: request %s will stop at %d tokens, the capacity of the KV cache", request.request_id, room
            )
            request.max_tokens = max(1, room - request.num_prompt_tokens)
            demand = demand._replace(num_tokens=slots)
        # The token that reaches `max_tokens` is never computed; one that reaches the model's length may be.
        end = min(request.num_prompt_tokens + request.max_tokens - 1, self.max_model_len)
        self.eviction.arrive(request.request_id, resolved, demand, end, request.prompt_token_ids or ())

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any) -> Any:
        blocks, num_found, *others = super()._get_local_prefix_cache_hit(request, *args)
        record = self.eviction.requests[request.request_id]
        num_cached = record.limit_cached(num_found)
        if self.num_spec_tokens and record.is_managed and 0 < num_cached == request.num_tokens - 1:
            # To the one token that is left vLLM would add placeholders of drafts, also beyond the bound.
            num_cached -= self.block_manager.block_size
        if num_cached < num_found:
            # What all groups have of the shorter prefix, which is not the beginning of the longer one in a group that
            # has only the last window of each.
            manager = self.kv_cache_manager
            found, num_found, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, num_cached)
            blocks = manager.create_kv_cache_blocks(found)
        return blocks, num_found, *others

    # ---- a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        plan = self.eviction.plan(self.running, self._preempt_for_blocks)
        output = self._schedule_step(throttle_prefills)
        orders = self.eviction.orders(plan, self.running, _first_scheduled(output), output.preempted_req_ids or ())
        if any(orders):
            compat.send_orders(output, orders)
        pool = self.kv_cache_manager.block_pool
        self.eviction.stats.blocks_in_use(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        if self.kv_policy.kv_check_integrity:
            self.check_integrity()
        return output

    def _schedule_step(self, throttle_prefills: bool) -> SchedulerOutput:
        """Schedule as vLLM does, but start no request in a step in which a compaction preempted one.

        This is vLLM's rule for every step that preempts; otherwise a request could resume in the step that preempts it.
        """
        if not self._has_preempted:
            return super().schedule(throttle_prefills)
        self._has_preempted, before, capacity_bound = False, self._pause_state, self.prefill_capacity_bound
        if before == PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW
        output = super().schedule(throttle_prefills)
        # A step in which vLLM itself preempts leaves both as they were.
        self._pause_state, self.prefill_capacity_bound = before, capacity_bound
        return output

    def _preempt_for_blocks(self) -> str:
        """Preempt the request that vLLM would preempt for a block; return its id."""
        if self.policy == SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
            self.running.remove(victim)
        else:
            victim = self.running.pop()
        self._preempt_request(victim, time.monotonic())
        self._has_preempted = True
        return victim.request_id

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # vLLM calls this for every request about to get tokens, to shorten chunks for drafters that are refused. It
        # skips a request with none. Chunks end where a compaction is due.
        record = self.eviction.requests[request.request_id]
        if record.num_postponed:
            return 0
        if self.num_spec_tokens:
            num_new_tokens = self._without_drafts_beyond(request, record, num_computed_tokens, num_new_tokens)
        elif num_new_tokens > 1:
            return min(num_new_tokens, record.planner.room(num_computed_tokens, record.num_evicted))
        promise = record.promise
        # A session may get more prompt later.
        is_decoding = num_computed_tokens + 1 >= request.num_tokens and not request.resumable
        if promise is not None and promise.num_in_flight and is_decoding:
            record.num_decoding += 1
            # With several steps in flight, one of them may still compute the end of the prompt.
            if record.num_decoding >= self._groups.others.num_steps:
                self.block_manager.settle(record)
        return num_new_tokens

    def _without_drafts_beyond(
        self, request: Request, record: RequestRecord, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Leave out the drafts with which a request could pass a point at which its exact count must be known."""
        num_known = request.num_tokens + request.num_output_placeholders - num_computed_tokens
        if num_new_tokens > num_known and request.status != RequestStatus.RUNNING:
            return num_new_tokens  # placeholders, which vLLM adds and must find again; they are never right
        scheduled = record.planner.without_drafts_beyond(
            num_computed_tokens,
            record.num_evicted,
            num_new=num_new_tokens,
            num_known=num_known,
            are_verified=not isinstance(self, AsyncScheduler),
        )
        self.eviction.stats.trimmed_drafts(max(num_new_tokens, num_known) - max(scheduled, num_known))
        return scheduled

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.eviction.preempted(request.request_id)
        if self.eviction.requests[request.request_id].steering is not None:
            # The prefix cache may hold the tokens it wrote while steered as another request's prompt.
            request.skip_reading_prefix_cache = True

    # ---- a request ends

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> dict[int, EngineCoreOutputs]:
        recalled = compat.received_recalled(model_runner_output)
        if recalled is not None:
            self.eviction.stats.recalled(recalled)
        by_client = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        for output in (output for outputs in by_client.values() for output in outputs.outputs):
            request, record = self.requests.get(output.request_id), self.eviction.requests.get(output.request_id)
            if request is None or record is None or request.sampling_params is None:
                continue
            # A stop string ends a request in the client's process, before the scheduler learns of it.
            if request.sampling_params.stop:
                output.kv_transfer_params = client_report(output.kv_transfer_params, record)
        return by_client

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        for_connector, *others = super()._free_request(request, *args, **kwargs)
        text = Text(request.prompt_token_ids or (), request.output_token_ids)
        return self.eviction.finish(request.request_id, text, for_connector), *others

    # ---- reports

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if not self.requests:
            self.eviction.idle()
        if stats is not None:
            with auxiliary("report to the metrics"):
                compat.send_report(stats, self.eviction.report(self.running))
        return stats

    def shutdown(self) -> None:
        super().shutdown()
        self.eviction.close()

    def check_integrity(self) -> None:
        """Verify the blocks, and that every request stays within its bound.

        Raises:
            AssertionError: see `EvictingBlockManager.check_integrity`, `TokenStore.check_integrity` and
                `EvictionController.check_bounds`.
        """
        self.block_manager.check_integrity()
        if self.eviction.store is not None:
            self.eviction.store.check_integrity()
        self.eviction.check_bounds(self.running)


def _first_scheduled(output: SchedulerOutput) -> list[str]:
    """Return the requests whose first tokens are computed in this step."""
    resumed = output.scheduled_cached_reqs.resumed_req_ids
    if not output.scheduled_new_reqs and not resumed:
        return []
    return [*(new.req_id for new in output.scheduled_new_reqs), *sorted(resumed)]


class EvictionScheduler(EvictionMixin, Scheduler):
    """Synchronous scheduler with eviction."""


class AsyncEvictionScheduler(EvictionMixin, AsyncScheduler):
    """Asynchronous scheduler with eviction. Counts include tokens in flight, so nothing has to wait."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """vLLM's `scheduler_cls`: picks the class once vLLM has settled on synchronous or asynchronous."""
    compat.enable(vllm_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    cls = AsyncEvictionScheduler if is_async else EvictionScheduler
    return cls(vllm_config=vllm_config, **kwargs)


__all__ = ["AsyncEvictionScheduler", "EvictionScheduler", "KVPolicyConfig", "make_scheduler"]
