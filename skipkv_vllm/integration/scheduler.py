"""vLLM's schedulers with eviction: they decide when a request is compacted and free its pages at once."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from ..banner import banner
from ..capacity import Capacity, capacity
from ..config import CONFIG_KEY, KVPolicyConfig, RequestOptions, needs_of
from ..core.auxiliary import auxiliary
from ..core.limits import Demand, Limits, LookaheadTokens, ceil_div, most_tokens
from ..core.needs import ACCUMULATED, FROM_RECENT_QUERIES, Need
from ..core.orders import Accumulation, Compaction, Started, SteeredRequest, StepOrders
from ..policies import Policy
from ..scheduler.admission import limits_of
from ..scheduler.planner import EvictionPlanner, Looks, PlannedCompaction, Residency
from ..scheduler.stats import EvictionStats, RequestEvictions
from ..sentences import build_tables
from ..steering.controller import SteeringController
from ..steering.tables import build_thought_tables
from ..trace.collector import TraceCollector
from . import compat
from .block_manager import CompactedPages, EvictingBlockManager
from .free_queue import GuardQueue
from .waiting_queue import PrefillLengthQueue

logger = init_logger("vllm.skipkv")

# The mixin overrides methods of either scheduler; for the type checker it is one.
if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class Terms(NamedTuple):
    """What is fixed for a managed request when it arrives.

    Attributes:
        policy: its method.
        limits: what it may hold.
        most_cached: tokens it may take from the prefix cache, whole pages.
        needs: what the workers collect for it.
        num_question: length of the question, where the request gave it; else 0.
    """

    policy: Policy
    limits: Limits
    most_cached: int
    needs: Need
    num_question: int


class EvictionMixin(_Base):
    """Plans compactions before vLLM schedules a step and sends them with it."""

    _pause_state: PauseState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_policy = compat.policy_config(self.vllm_config)
        compat.check_kv_cache(self.kv_cache_config, self.kv_policy)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        # Where nothing is evicted, to promise the longest a request may get would admit fewer than stock vLLM.
        is_bounded = self.kv_policy.kv_admission == "bounded" and self.kv_policy.evicts
        self.block_manager = EvictingBlockManager.adopt(manager, is_bounded=is_bounded)
        self.planner = EvictionPlanner()
        self._observes = bool(self.kv_policy.needs & FROM_RECENT_QUERIES)
        self.eviction_stats = EvictionStats()
        self.trace = self._make_trace() if self.kv_policy.kv_trace_dir else None
        self._terms: dict[str, Terms] = {}
        self._recomputed: set[str] = set()
        self._is_short = False
        self._evictions: dict[str, RequestEvictions] = {}
        self.steering = self._make_steering() if self.kv_policy.steers else None
        self._steered: dict[str, SteeredRequest] = {}
        if self.kv_policy.kv_batch_grouping != "off":
            self.waiting = PrefillLengthQueue(
                self.kv_policy.kv_grouping_width,
                self.kv_policy.kv_grouping_max_wait,
                by_priority=self.policy is SchedulingPolicy.PRIORITY,
            )
        if self.kv_policy.kv_prefix_eviction == "guard":
            pool = self.kv_cache_manager.block_pool
            pool.free_block_queue = GuardQueue.adopt(pool.free_block_queue)
        with auxiliary("print the banner"):
            found = self._capacity() if self.kv_policy.evicts else None
            for line in banner(self.kv_policy, found, self.max_model_len, is_async=isinstance(self, AsyncScheduler)):
                logger.info(line)

    def _capacity(self) -> Capacity:
        (group,) = self.kv_cache_config.kv_cache_groups
        shape = compat.model_shape(self.vllm_config, len(group.layer_names), group.kv_cache_spec.dtype)
        return capacity(self.kv_policy, shape, compat.block_pool(self.vllm_config, self.kv_cache_config.num_blocks))

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self._declare(request)
        super().add_request(request)

    def _declare(self, request: Request) -> None:
        """Settle what a new request may hold, before anything of it is scheduled."""
        request_id, page_size = request.request_id, self.block_manager.block_size
        terms, longest, num_intact, lookahead = None, self.max_model_len, sys.maxsize, LookaheadTokens()
        if request.resumable:
            # A session that grows its prompt rewrites tokens and hashes; it keeps everything.
            self.eviction_stats.skipped("streaming_input")
        elif request.sampling_params is not None:
            options = RequestOptions.parse(
                request.sampling_params.extra_args, self.kv_policy, self.max_model_len, check_names=False
            )
            longest = min(request.num_prompt_tokens + request.max_tokens, longest)
            terms = self._terms_of(request, options)
            self._start_steering(request, options)
        if terms is not None:
            self._terms[request_id] = terms
            num_intact, lookahead = terms.limits.protected // page_size, terms.limits.lookahead
        num_tokens = most_tokens(None if terms is None else terms.limits, longest)
        ledger = self.block_manager.ledger
        if num_tokens > (room := ledger.num_pages * page_size):
            # The API server refuses such requests, but with data parallelism it knows the mean of the pools only.
            logger.warning("SkipKV: request %s ends at %d tokens: the KV cache holds no more", request_id, room)
            request.max_tokens = max(1, room - request.num_prompt_tokens)
            num_tokens = room
        ledger.declare(request_id, Demand(num_tokens, num_intact, lookahead))

    def _terms_of(self, request: Request, options: RequestOptions) -> Terms | None:
        """The terms of a request; None for one that keeps everything."""
        limits = limits_of(options, self.kv_policy, request.num_prompt_tokens)
        if limits is None:
            return None
        policy = options.resolve_policy(self.kv_policy)
        needs = needs_of(policy, self.kv_policy.kv_granularity)
        most_cached, looks = limits.cacheable, None
        if needs & (Need.SENTENCES | Need.SEGMENTS):
            # Workers read text, hidden states and queries as tokens are computed: so what may be evicted is computed.
            most_cached = min(most_cached, limits.protected)
        if needs & ACCUMULATED:
            # From the prompt's last token on, or from as many before the first compaction as between two.
            first = min(request.num_prompt_tokens - 1, limits.first_bound - limits.buffer)
            looks = Looks(first, self.kv_policy.num_queries, at_all=True)
            most_cached = min(most_cached, first)
        if needs & Need.SEGMENTS:
            looks = Looks(limits.protected, policy.segment_options.length, at_all=False)
        self.planner.start(request.request_id, limits, looks)
        page_size = self.block_manager.block_size
        return Terms(policy, limits, most_cached // page_size * page_size, needs, options.kv_task_tokens or 0)

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        blocks, num_cached, *others = super()._get_local_prefix_cache_hit(request)
        terms = self._terms.get(request.request_id)
        if terms is not None and num_cached > terms.most_cached:
            num_cached = terms.most_cached
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_cached)
            if terms.needs & Need.SENTENCES and not terms.limits.protected:
                self._recomputed.add(request.request_id)
        return blocks, num_cached, *others

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # vLLM asks this of every request about to get tokens, to shorten chunks for speculative decoding, which is
        # refused. Chunks end where a compaction is due.
        if num_new_tokens > 1:
            num_evicted = self.block_manager.num_evicted(request.request_id)
            room = self.planner.room(request.request_id, num_computed_tokens, num_evicted)
            return min(num_new_tokens, room)
        return num_new_tokens

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        compactions, accumulations = self._compact()
        if self._is_short:
            # As in any step that preempts, nobody new starts; else a victim could resume in the step that stops it.
            self._is_short, before = False, self._pause_state
            if before == PauseState.UNPAUSED:
                self._pause_state = PauseState.PAUSED_NEW
            output = super().schedule(throttle_prefills)
            self._pause_state = before
        else:
            output = super().schedule(throttle_prefills)
        # A request that this very step preempted has lost its pages; its orders must not be carried out.
        if preempted := output.preempted_req_ids:
            compactions = [c for c in compactions if c.request_id not in preempted]
            accumulations = [o for o in accumulations if o.request_id not in preempted]
        first_scheduled = self._first_scheduled(output)
        started = [self._start(i, self._terms[i]) for i in first_scheduled if i in self._terms]
        steered = [self._steered[i] for i in first_scheduled if i in self._steered]
        for compaction in compactions:
            self.eviction_stats.compacted(compaction)
            self._evictions[compaction.request_id].compacted(compaction)
        if self.trace is not None:
            self.trace.sent(compactions, started)
        # The counts include the tokens of this step by now.
        records_queries = self._observes or any(
            self.planner.needs_queries(r.request_id, r.num_computed_tokens) for r in self.running
        )
        orders = StepOrders(compactions, started, accumulations, records_queries, steered)
        if any(orders):
            compat.send_orders(output, orders)
        pool = self.kv_cache_manager.block_pool
        self.eviction_stats.holding(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        if self.kv_policy.kv_check_integrity:
            self.check_integrity()
        return output

    def _compact(self) -> tuple[list[Compaction], list[Accumulation]]:
        """Plan this step's orders and free the pages of the compactions, so that this very step can use them."""
        earliest = self.planner.earliest
        candidates = [
            Residency(r.request_id, r.num_computed_tokens, self.block_manager.num_evicted(r.request_id))
            for r in self.running
            if self._observes or r.num_computed_tokens >= earliest.get(r.request_id, sys.maxsize)
        ]
        if not candidates:
            return [], []
        compactions, planned = [], self.planner.plan(candidates)
        accumulations = self._observe(candidates, {plan.request_id for plan in planned})
        # Before any page is freed, so that none of them is still to be read.
        scratch = self._borrow(planned)
        for plan in planned:
            pages = self._compact_request(plan)
            if pages is None:
                continue
            num_logical = self.requests[plan.request_id].num_computed_tokens
            compactions.append(
                Compaction(
                    request_id=plan.request_id,
                    num_logical=num_logical,
                    num_resident=plan.num_resident,
                    num_keep=plan.num_keep,
                    source_blocks=pages.source_blocks,
                    target_blocks=pages.target_blocks,
                    ordinal=self.planner.num_compactions(plan.request_id),
                    lookahead_blocks=scratch.get(plan.request_id, []),
                )
            )
            self.planner.committed(plan.request_id, num_logical)
        if scratch:
            self.block_manager.give_back()
        return compactions, accumulations

    def _borrow(self, planned: list[PlannedCompaction]) -> dict[str, list[int]]:
        """Pages, by request, for tokens that are computed ahead.

        With bounded admission they were promised. With optimistic admission they may not be there; then the request is
        compacted without those tokens' queries, and that is counted.
        """
        pages = {}
        for plan in planned:
            if not plan.num_lookahead:
                continue
            found = self.block_manager.borrow(plan.num_lookahead)
            if found is None:
                self.eviction_stats.skipped("no_pages_for_probe")
            else:
                pages[plan.request_id] = found
        return pages

    def _compact_request(self, plan: PlannedCompaction) -> CompactedPages | None:
        """Take a request's pages away; None if the request itself was preempted.

        With optimistic admission a shared page may have to be replaced while no page is free. Then requests are
        preempted as vLLM does it for a new page: a compaction that waited would evict other tokens.
        """
        while self.requests[plan.request_id].status == RequestStatus.RUNNING:
            pages = self.block_manager.compact(plan)
            if pages is not None:
                return pages
            if self.policy == SchedulingPolicy.PRIORITY:
                victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
                self.running.remove(victim)
            else:
                victim = self.running.pop()
            self._preempt_request(victim, time.monotonic())
            self._is_short = True
        return None

    def _observe(self, candidates: list[Residency], compacted: set[str]) -> list[Accumulation]:
        """The attention to count in this step, with the pages as they are before its compactions."""
        if not self._observes:
            return []
        accumulations = []
        for request_id, num_logical, num_evicted in candidates:
            num_queries = self.planner.observe(request_id, num_logical, request_id in compacted)
            if num_queries:
                pages = self.block_manager.pages(request_id)
                accumulations.append(
                    Accumulation(request_id, num_logical, num_logical - num_evicted, num_queries, pages)
                )
        return accumulations

    def _first_scheduled(self, output: SchedulerOutput) -> list[str]:
        """Requests whose first tokens are computed in this step."""
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        if not output.scheduled_new_reqs and not resumed:
            return []
        return [*(new.req_id for new in output.scheduled_new_reqs), *sorted(resumed)]

    def _start(self, request_id: str, terms: Terms) -> Started:
        limits = terms.limits
        if limits.keep > limits.budget:
            self.eviction_stats.skipped("prompt_exceeds_budget")
        if request_id in self._recomputed:
            self._recomputed.discard(request_id)
            self.eviction_stats.skipped("cached_prompt_sentences")
        before = self._evictions.get(request_id)
        lives = 1 if before is None else before.lives + 1
        self._evictions[request_id] = RequestEvictions(terms.policy.name, lives=lives)
        num_prompt = self.requests[request_id].num_prompt_tokens
        return Started(
            request_id, terms.policy.name, num_prompt, limits.protected, limits.protected, terms.num_question
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.planner.restart(request.request_id)
        if request.request_id in self._steered:
            # What it wrote while steered may be in the prefix cache as another's prompt.
            request.skip_reading_prefix_cache = True

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        by_client = super().update_from_output(*args, **kwargs)
        for output in (output for outputs in by_client.values() for output in outputs.outputs):
            request = self.requests.get(output.request_id)
            # A stop string ends a request in the client's process, before the scheduler learns of it.
            if request is not None and request.sampling_params is not None and request.sampling_params.stop:
                evictions = self._evictions.get(output.request_id)
                output.kv_transfer_params = _with_report(output.kv_transfer_params, evictions)
        return by_client

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        steered = None
        with auxiliary("report on steering"):
            steered = self._finish_steering(request)
        if self.trace is not None:
            text = list(request.prompt_token_ids or ()), list(request.output_token_ids)
            self.trace.finish(request.request_id, *text, steered)
        request_id = request.request_id
        self.planner.stop(request_id)
        self._terms.pop(request_id, None)
        self._recomputed.discard(request_id)
        evictions = self._evictions.pop(request_id, None)
        for_connector, *others = super()._free_request(request, *args, **kwargs)
        self.block_manager.ledger.withdraw(request_id)
        self.block_manager.forget(request_id)
        return _with_report(for_connector, evictions, steered), *others

    def _start_steering(self, request: Request, options: RequestOptions) -> None:
        name = options.vector(self.kv_policy)
        if self.steering is None or name is None:
            return
        number = 1 + list(self.kv_policy.kv_steering_vectors).index(name)
        prompt = request.prompt_token_ids or [0] * request.num_prompt_tokens
        start = self.steering.start(request.request_id, prompt, number, options.strength(self.kv_policy))
        self._steered[request.request_id] = start
        self.block_manager.keep_private(request.request_id, start.first)

    def _finish_steering(self, request: Request) -> dict[str, Any] | None:
        """Count what a steered request thought; what there is to say about it."""
        start = self._steered.pop(request.request_id, None)
        if start is None or self.steering is None:
            return None
        # The token sampled last was never read.
        read = list(request.all_token_ids)[: max(start.first, request.num_tokens - 1)]
        thoughts = self.steering.finish(start, read)
        self.eviction_stats.thought(thoughts)
        name = list(self.kv_policy.kv_steering_vectors)[start.state[0] - 1]
        return {"vector": name, "alpha0": start.strength.alpha0, "gamma": start.strength.gamma} | thoughts._asdict()

    def _make_steering(self) -> SteeringController:
        config, model = self.kv_policy, self.vllm_config.model_config
        tables = build_thought_tables(
            cached_tokenizer_from_config(model), model.get_vocab_size(), config.kv_steering_compat
        )
        return SteeringController(tables, config.kv_steering_interval, config.kv_steering_compat == "published")

    def _make_trace(self) -> TraceCollector:
        model = self.vllm_config.model_config
        tables = None
        if not model.skip_tokenizer_init:
            tables = build_tables(cached_tokenizer_from_config(model), self.kv_policy.policy.sentence_options.compat)
        parameters = self.kv_policy.model_dump() | {"model": model.model, "page_size": self.block_manager.block_size}
        parallel = self.parallel_config
        grid = (parallel.pipeline_parallel_size, parallel.tensor_parallel_size)
        return TraceCollector(self.kv_policy, grid, tables, parameters)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if self.trace is not None and not self.requests:
            self.trace.settle()
        if stats is not None:
            with auxiliary("report to the metrics"):
                compat.send_report(stats, self._report())
        return stats

    def _report(self) -> dict[str, float]:
        num_logical = sum(r.num_computed_tokens for r in self.running)
        num_evicted = sum(self.block_manager.num_evicted(r.request_id) for r in self.running)
        if self.trace is not None:
            self.eviction_stats.dropped_traces(self.trace.take_dropped())
        return self.eviction_stats.take(num_logical, num_logical - num_evicted, self.block_manager.ledger.num_promised)

    def shutdown(self) -> None:
        super().shutdown()
        if self.trace is not None:
            with auxiliary("finish the traces"):
                self.trace.close()

    def check_integrity(self) -> None:
        """Verify pages, and that every managed request stays within its bound, also while its text is computed.

        Raises:
            AssertionError: see `EvictingBlockManager.check_integrity`.
        """
        self.block_manager.check_integrity()
        for request in self.running:
            request_id = request.request_id
            bound = self.planner.bound(request_id)
            if bound is None:
                continue
            resident = request.num_computed_tokens - self.block_manager.num_evicted(request_id)
            assert resident <= bound, f"{request_id} holds {resident} of at most {bound} tokens"
            pages, most = self.block_manager.num_pages(request_id), ceil_div(bound, self.block_manager.block_size)
            assert pages <= most, f"{request_id} holds {pages} of at most {most} pages"


def _with_report(
    params: dict[str, Any] | None, evictions: RequestEvictions | None, steered: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Put what happened to a request into its `kv_transfer_params`, which vLLM hands to the client as they are."""
    if evictions is None and steered is None:
        return params
    # Not `asdict`, which copies deeply: for a request with a stop string this runs in every step.
    report = {"policy": "full"} if evictions is None else dict(vars(evictions))
    return (params or {}) | {CONFIG_KEY: report | ({} if steered is None else {"steering": steered})}


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
