"""vLLM's schedulers with eviction: they decide when a request is compacted and free its pages at once."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from .. import compat
from ..banner import banner
from ..config import CONFIG_KEY, KVPolicyConfig, RequestOptions, needs_of
from ..metrics import EvictionStats, RequestEvictions
from ..policies import Need
from ..sentences import build_tables
from ..steering.controller import SteeredRequest, SteeringController
from ..steering.tables import build_thought_tables
from ..trace import TraceCollector
from .block_manager import EvictingBlockManager
from .messages import Started, StepOrders
from .planner import Compaction, EvictionPlanner, Limits, Observation, Residency

logger = init_logger("vllm.skipkv")

# The mixin overrides methods of either scheduler; for the type checker it is one.
if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class EvictionMixin(_Base):
    """Plans compactions before vLLM schedules a step and sends them with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_policy = compat.policy_config(self.vllm_config)
        compat.check_kv_cache(self.kv_cache_config)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        self.block_manager = EvictingBlockManager.adopt(manager)
        self.planner = EvictionPlanner()
        self._observes = bool(self.kv_policy.needs & Need.ATTENTION_MASS)
        self.eviction_stats = EvictionStats()
        self.trace = self._make_trace() if self.kv_policy.kv_trace_dir else None
        self._options: dict[str, RequestOptions] = {}
        self._evictions: dict[str, RequestEvictions] = {}
        self.steering = self._make_steering() if self.kv_policy.steers else None
        self._steered: dict[str, SteeredRequest] = {}
        for line in banner(self.kv_policy, self.block_manager.block_size, self.max_model_len):
            logger.info(line)

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        params = request.sampling_params
        if request.resumable:
            # A session that grows its prompt rewrites tokens and hashes; it keeps everything.
            self.eviction_stats.skipped("streaming_input")
        elif params is not None:
            options = RequestOptions.parse(params.extra_args, self.kv_policy, self.max_model_len)
            self._options[request.request_id] = options
            if self.steering is not None and (name := options.vector(self.kv_policy)) is not None:
                number = 1 + list(self.kv_policy.kv_steering_vectors).index(name)
                start = self.steering.start(
                    request.request_id,
                    request.prompt_token_ids or [0] * request.num_prompt_tokens,
                    number,
                    options.strength(self.kv_policy),
                )
                self._steered[request.request_id] = start
                self.block_manager.keep_private(request.request_id, start.first)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        compactions, observations = self._compact()
        output = super().schedule(throttle_prefills)
        # A request that this very step preempted has lost its pages; its orders must not be carried out.
        if preempted := output.preempted_req_ids:
            compactions = [c for c in compactions if c.request_id not in preempted]
            observations = [o for o in observations if o.request_id not in preempted]
        first_scheduled = self._first_scheduled(output)
        started = self._started(first_scheduled)
        steered = self._started_steering(first_scheduled) if self._steered else []
        for compaction in compactions:
            self.eviction_stats.compacted(compaction)
            self._evictions[compaction.request_id].compacted(compaction)
            if self.trace is not None:
                self.trace.compacted(compaction)
        if self.trace is not None:
            for start in started:
                self.trace.started(start)
        # The counts include the tokens of this step by now.
        records_queries = self._observes or any(
            self.planner.needs_queries(r.request_id, r.num_computed_tokens) for r in self.running
        )
        compat.send_orders(output, StepOrders(compactions, started, observations, records_queries, steered))
        pool = self.kv_cache_manager.block_pool
        self.eviction_stats.holding(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        if self.kv_policy.kv_check_integrity:
            self.check_integrity()
        return output

    def _compact(self) -> tuple[list[Compaction], list[Observation]]:
        """Plan this step's orders and free the pages of the compactions, so that this very step can use them."""
        earliest = self.planner.earliest
        decoding = [
            Residency(r.request_id, r.num_computed_tokens, self.block_manager.num_evicted(r.request_id))
            for r in self.running
            if (self._observes or r.num_computed_tokens >= earliest.get(r.request_id, sys.maxsize))
            and not r.is_prefill_chunk
        ]
        if not decoding:
            return [], []
        compactions, planned = [], self.planner.plan(decoding)
        observations = self._observe(decoding, {plan.request_id for plan in planned})
        for plan in planned:
            pages = self.block_manager.compact(plan)
            if pages is None:
                self.eviction_stats.skipped("no_free_page")
                continue
            num_logical = self.requests[plan.request_id].num_computed_tokens
            compactions.append(
                Compaction(
                    request_id=plan.request_id,
                    num_logical=num_logical,
                    num_resident=plan.num_resident,
                    num_keep=plan.num_keep,
                    source_pages=pages.source_pages,
                    target_pages=pages.target_pages,
                    ordinal=self.planner.num_compactions(plan.request_id),
                )
            )
            self.planner.committed(plan.request_id, num_logical)
        return compactions, observations

    def _observe(self, decoding: list[Residency], compacted: set[str]) -> list[Observation]:
        """The attention to count in this step, with the pages as they are before its compactions."""
        if not self._observes:
            return []
        observations = []
        for request_id, num_logical, num_evicted in decoding:
            num_queries = self.planner.observe(request_id, num_logical, request_id in compacted)
            if num_queries:
                pages = self.block_manager.pages(request_id)
                observations.append(Observation(request_id, num_logical, num_logical - num_evicted, num_queries, pages))
        return observations

    def _first_scheduled(self, output: SchedulerOutput) -> dict[str, int]:
        """Requests whose first tokens are computed in this step, with the tokens found in the prefix cache."""
        cached = output.scheduled_cached_reqs
        if not output.scheduled_new_reqs and not cached.resumed_req_ids:
            return {}
        num_cached = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        num_cached |= {
            request_id: num_computed
            for request_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            if request_id in cached.resumed_req_ids
        }
        return num_cached

    def _started(self, num_cached: dict[str, int]) -> list[Started]:
        """Those of them that are managed."""
        started = [self._start(self.requests[request_id], hit) for request_id, hit in num_cached.items()]
        return [s for s in started if s is not None]

    def _started_steering(self, num_cached: dict[str, int]) -> list[SteeredRequest]:
        """Those of them that are steered."""
        steered = [self._steered[request_id] for request_id in num_cached if request_id in self._steered]
        for start in steered:
            assert num_cached[start.request_id] <= start.first, "steered tokens were taken from the prefix cache"
        return steered

    def _start(self, request: Request, num_cached: int) -> Started | None:
        config, options = self.kv_policy, self._options.get(request.request_id)
        if options is None:
            return None
        policy = options.resolve_policy(config)
        if policy.name == "full":
            return None
        protected = request.num_prompt_tokens if config.kv_protect_prompt else 0
        budget = options.kv_budget if options.kv_budget is not None else config.kv_budget
        limits = Limits(budget, config.kv_buffer, config.kv_window, protected)
        mass = needs_of(policy, config.kv_granularity) & Need.ATTENTION_MASS
        # vLLM always computes a new request's last prompt token, whatever the prefix cache holds.
        self.planner.start(request.request_id, limits, num_cached, request.num_prompt_tokens - 1 if mass else None)
        if limits.keep > budget:
            self.eviction_stats.skipped("prompt_exceeds_budget")
        # A preempted request keeps its count: what was evicted in its first life was evicted.
        self._evictions.setdefault(request.request_id, RequestEvictions(policy.name))
        first_tracked = protected
        if not config.kv_protect_prompt:
            first_tracked = num_cached
            if num_cached and needs_of(policy, config.kv_granularity) & Need.HIDDEN:
                self.eviction_stats.skipped("cached_prompt_sentences")
        return Started(request.request_id, policy.name, request.num_prompt_tokens, protected, first_tracked)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.planner.stop(request.request_id)
        if self.kv_policy.needs & Need.SENTENCES or request.request_id in self._steered:
            # Its own pages may still be in the prefix cache, but cached tokens have no hidden states, and
            # what they say must be known again. What it wrote while steered may be there as another's prompt.
            request.skip_reading_prefix_cache = True

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        steered = self._finish_steering(request)
        if self.trace is not None:
            self._write_trace(request, steered)
        self.planner.stop(request.request_id)
        self._options.pop(request.request_id, None)
        evictions = self._evictions.pop(request.request_id, None)
        for_connector, *others = super()._free_request(request, *args, **kwargs)
        self.block_manager.forget(request.request_id)
        if evictions is not None or steered is not None:
            # vLLM hands this field to the client as it is; connectors, its usual authors, are refused.
            told = asdict(evictions) if evictions is not None else {"policy": "full"}
            told |= {"steering": steered} if steered is not None else {}
            for_connector = (for_connector or {}) | {CONFIG_KEY: told}
        return for_connector, *others

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
        return SteeringController(tables, config.kv_steering_interval, config.kv_steering_compat == "reference")

    def _make_trace(self) -> TraceCollector:
        model = self.vllm_config.model_config
        tables = None
        if not model.skip_tokenizer_init:
            tables = build_tables(cached_tokenizer_from_config(model), self.kv_policy.policy.sentence_options.compat)
        parameters = self.kv_policy.model_dump() | {"model": model.model, "page_size": self.block_manager.block_size}
        return TraceCollector(self.kv_policy, self.parallel_config.tensor_parallel_size, tables, parameters)

    def _write_trace(self, request: Request, steered: dict[str, Any] | None) -> None:
        assert self.trace is not None
        text = list(request.prompt_token_ids or ()), list(request.output_token_ids)
        try:
            self.trace.finish(request.request_id, *text, steered)
        except (OSError, TimeoutError) as error:
            # A trace is worth less than the server; say so and go on.
            logger.error("SkipKV: no trace of request %s: %s", request.request_id, error)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            num_logical = sum(r.num_computed_tokens for r in self.running)
            num_evicted = sum(self.block_manager.num_evicted(r.request_id) for r in self.running)
            compat.send_report(stats, self.eviction_stats.take(num_logical, num_logical - num_evicted))
        return stats

    def check_integrity(self) -> None:
        """Verify pages, and that every decoding request stays within its bound.

        Raises:
            AssertionError: see `EvictingBlockManager.check_integrity`.
        """
        self.block_manager.check_integrity()
        page = self.block_manager.block_size
        for request in self.running:
            limits = self.planner.limits(request.request_id)
            evicted = self.block_manager.num_evicted(request.request_id)
            if limits is None or not evicted:
                continue
            resident = request.num_computed_tokens - evicted
            assert resident <= limits.bound, f"{request.request_id} holds {resident} of at most {limits.bound} tokens"
            pages = self.block_manager.num_pages(request.request_id)
            assert pages <= limits.bound_pages(page) + 1, f"{request.request_id} holds {pages} pages"


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
