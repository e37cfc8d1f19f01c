"""The controller: which orders a step gets and what the listeners are told, with a block manager of this test's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from skipkv_vllm.config import CONFIG_KEY, KEEP_EVERYTHING, KVPolicyConfig, RequestOptions
from skipkv_vllm.core.limits import ceil_div
from skipkv_vllm.core.orders import SteeredRequest, Strength
from skipkv_vllm.scheduler.eviction import CompactedBlocks, EvictionController
from skipkv_vllm.scheduler.listeners import ClientReports
from skipkv_vllm.scheduler.planner import PlannedCompaction
from skipkv_vllm.scheduler.requests import RequestListener, RequestRecord, Text
from skipkv_vllm.scheduler.stats import EvictionStats
from skipkv_vllm.steering.controller import Thoughts

BLOCK = 4
CONFIG = KVPolicyConfig(kv_policy="rkv", kv_budget=20, kv_buffer=8, kv_window=4)


@dataclass
class Running:
    """As much of vLLM's request as the controller reads."""

    request_id: str
    num_computed_tokens: int


class Blocks:
    """Numbers blocks by request; frees nothing that a test does not ask for."""

    block_size = BLOCK
    num_promised = 7

    def __init__(self, requests: dict[str, RequestRecord]) -> None:
        self.requests = requests
        self.tables: dict[str, list[int]] = {}
        self.log: list[str] = []
        self.num_refused: dict[str, int] = {}
        self.has_lookahead = True

    def blocks(self, request_id: str) -> list[int]:
        return list(self.tables[request_id])

    def compact(self, request_id: str, plan: PlannedCompaction) -> CompactedBlocks | None:
        if self.num_refused.get(request_id):
            self.num_refused[request_id] -= 1
            return None
        self.log.append(f"compact {request_id}")
        source = self.tables[request_id]
        target = self.tables[request_id] = source[: ceil_div(plan.num_keep, BLOCK)]
        self.requests[request_id].num_evicted += plan.num_resident - plan.num_keep
        return CompactedBlocks(source, target)

    def take_lookahead(self, num_tokens: int) -> list[int] | None:
        self.log.append(f"take {num_tokens}")
        return [1000 + i for i in range(ceil_div(num_tokens, BLOCK))] if self.has_lookahead else None

    def return_lookahead(self) -> None:
        self.log.append("return")

    def forget(self, request_id: str) -> None:
        self.log.append(f"forget {request_id}")


@dataclass
class Recorder(RequestListener):
    """Writes down what it is told."""

    events: list[tuple[str, ...]] = field(default_factory=list)

    def arrived(self, request, prompt) -> None:
        self.events.append(("arrived", request.request_id, *map(str, prompt)))

    def started(self, request, order) -> None:
        self.events.append(("started", order.request_id, order.policy))

    def compacted(self, request, order) -> None:
        self.events.append(("compacted", order.request_id, str(order.ordinal)))

    def finished(self, request, text) -> None:
        self.events.append(("finished", request.request_id, *map(str, text.output)))

    def before_report(self) -> None:
        self.events.append(("before report",))

    def idle(self) -> None:
        self.events.append(("idle",))

    def close(self) -> None:
        self.events.append(("close",))


class Bench:
    """A controller with running requests."""

    def __init__(self, config: KVPolicyConfig = CONFIG) -> None:
        self.config = config
        self.requests: dict[str, RequestRecord] = {}
        self.blocks, self.recorder, self.stats = Blocks(self.requests), Recorder(), EvictionStats()
        listeners = [self.stats, ClientReports(), self.recorder]
        self.controller = EvictionController(config, self.requests, self.blocks, self.stats, listeners)
        self.running: list[Running] = []

    def arrive(self, name: str, num_prompt: int, options: RequestOptions | None = None) -> RequestRecord:
        resolved = (options or RequestOptions()).resolve(self.config, num_prompt)
        self.controller.arrive(name, resolved, resolved.demand(500, BLOCK), 500, [1, 2])
        return self.requests[name]

    def run(self, name: str, num_computed: int) -> None:
        """Begin a request with so many tokens computed."""
        number = 100 * len(self.running)
        self.running.append(Running(name, num_computed))
        self.blocks.tables[name] = list(range(number, number + ceil_div(num_computed, BLOCK)))

    def preempt(self) -> str:
        name = self.running.pop().request_id
        self.controller.preempted(name)
        return name

    def step(self, first: tuple[str, ...] = (), preempted: tuple[str, ...] = ()) -> Any:
        plan = self.controller.plan(self.running, self.preempt)
        for request in self.running:
            request.num_computed_tokens += 1
        return self.controller.orders(plan, self.running, first, preempted)


def bench_with(*names: str, num_computed: int = 28, config: KVPolicyConfig = CONFIG) -> Bench:
    """Requests that started, with a prompt of 6 tokens."""
    bench = Bench(config)
    for name in names:
        bench.arrive(name, 6)
        bench.run(name, num_computed)
    bench.controller.orders(bench.controller.plan([], bench.preempt), [], names, ())
    bench.recorder.events.clear()
    return bench


def test_a_step_in_which_nothing_is_due_orders_nothing():
    bench = bench_with("a", num_computed=16)
    orders = bench.step()
    assert not any(orders)
    assert not bench.blocks.log
    assert not bench.recorder.events


def test_a_request_is_compacted_at_its_bound_and_everybody_hears_of_it():
    bench = bench_with("a", "b")
    bench.running[1].num_computed_tokens = 27
    (order,) = bench.step().compactions
    assert (order.request_id, order.num_logical, order.num_resident, order.num_keep) == ("a", 28, 28, 20)
    assert (order.source_blocks, order.target_blocks, order.ordinal) == ([*range(7)], [*range(5)], 0)
    assert bench.recorder.events == [("compacted", "a", "0")]
    (order,) = bench.step().compactions
    assert (order.request_id, order.ordinal) == ("b", 0)
    assert bench.stats.take(0, 0, 0)["compactions"] == 2


def test_the_others_that_are_due_wait_for_a_later_step_and_nobody_falls_behind():
    """Ten requests in time with each other: the four that waited longest come first, whatever their place."""
    config = KVPolicyConfig(kv_policy="rkv", kv_budget=20, kv_buffer=8, kv_window=4, kv_compactions_per_step=4)
    bench = bench_with(*"abcdefghij", config=config)
    compacted, longest_wait = [], 0
    for _ in range(40):
        plan = bench.controller.plan(bench.running, bench.preempt)
        waits = {name: record.num_postponed for name, record in bench.requests.items()}
        for request in bench.running:
            request.num_computed_tokens += not waits[request.request_id]
        orders = bench.controller.orders(plan, bench.running, (), ())
        bench.controller.check_bounds(bench.running)
        compacted.append("".join(order.request_id for order in orders.compactions))
        longest_wait = max(longest_wait, *waits.values())
    assert compacted[:4] == ["abcd", "efgh", "ij", ""]
    assert compacted[8:12] == ["abcd", "efgh", "ij", ""]
    assert longest_wait == 2
    assert bench.stats.take(0, 0, 0)["postponed_compactions"] == 6 + 2


def test_more_are_compacted_than_allowed_if_requests_come_due_faster():
    config = KVPolicyConfig(kv_policy="rkv", kv_budget=20, kv_buffer=8, kv_window=4, kv_compactions_per_step=1)
    bench = bench_with(*map(str, range(12)), config=config)
    assert [len(bench.controller.plan(bench.running, bench.preempt).compactions) for _ in range(5)] == [3] * 4 + [0]


def test_a_preempted_request_no_longer_waits():
    config = KVPolicyConfig(kv_policy="rkv", kv_budget=20, kv_buffer=8, kv_window=4, kv_compactions_per_step=1)
    bench = bench_with("a", "b", config=config)
    bench.step()
    assert bench.requests["b"].num_postponed == 1
    bench.controller.preempted("b")
    assert bench.requests["b"].num_postponed == 0


def test_queries_are_recorded_only_when_a_compaction_is_near():
    bench = bench_with("a", num_computed=20)
    assert [bench.step().records_queries for _ in range(8)] == [False] * 4 + [True] * 4


def test_a_request_starts_with_its_method_and_is_told_apart_from_one_that_keeps_everything():
    bench = Bench()
    bench.arrive("a", 30)
    bench.arrive("b", 6, KEEP_EVERYTHING)
    bench.arrive("c", 6).steering = steered = SteeredRequest("c", 6, [], Strength(1, 0, 2))
    orders = bench.step(first=("a", "b", "c"))
    assert [start[:4] for start in orders.started] == [("a", "rkv", 30, 30), ("c", "rkv", 6, 6)]
    assert orders.steered == [steered]
    events = [("arrived", name, "1", "2") for name in "abc"]
    assert bench.recorder.events == [*events, ("started", "a", "rkv"), ("started", "c", "rkv")]
    assert bench.stats.take(0, 0, 0)["skipped:prompt_exceeds_budget"] == 1
    bench.run("b", 400)
    assert not any(bench.step())


def test_orders_of_a_preempted_request_are_dropped_and_nobody_hears_of_them():
    bench = bench_with("a", "b")
    orders = bench.step(preempted=("a",))
    assert [order.request_id for order in orders.compactions] == ["b"]
    assert bench.recorder.events == [("compacted", "b", "0")]


@pytest.mark.parametrize(("num_refused", "left"), [(1, ["a", "b"]), (2, ["a"]), (3, [])])
def test_a_compaction_without_a_free_block_preempts_until_there_is_one_or_it_is_preempted_itself(num_refused, left):
    bench = bench_with("a", "b", "c")
    bench.blocks.num_refused["a"] = num_refused
    orders = bench.step()
    assert [order.request_id for order in orders.compactions] == left
    assert [request.request_id for request in bench.running] == left


def test_lookahead_blocks_are_taken_before_and_returned_after_the_compactions():
    config = KVPolicyConfig(kv_policy="laq", kv_budget=20, kv_buffer=8, kv_window=4, kv_protect_prompt=False)
    bench = Bench(config)
    for name in "ab":
        bench.arrive(name, 24)
        bench.run(name, 24)
    orders = bench.controller.plan(bench.running, bench.preempt)
    needed = config.policy.lookahead_plan.num_tokens + 20
    assert bench.blocks.log == [f"take {needed}", f"take {needed}", "compact a", "compact b", "return"]
    assert all(order.lookahead_blocks for order in orders.compactions)


def test_without_free_blocks_a_request_is_compacted_without_lookahead_which_is_counted():
    bench = Bench(KVPolicyConfig(kv_policy="laq", kv_budget=20, kv_buffer=8, kv_window=4, kv_protect_prompt=False))
    bench.blocks.has_lookahead = False
    bench.arrive("a", 24)
    bench.run("a", 24)
    (order,) = bench.controller.plan(bench.running, bench.preempt).compactions
    assert order.lookahead_blocks == []
    assert "return" not in bench.blocks.log
    assert bench.stats.take(0, 0, 0)["skipped:no_pages_for_probe"] == 1


def test_queries_are_accumulated_with_the_blocks_before_the_compaction():
    bench = bench_with("a", config=KVPolicyConfig(kv_policy="h2o", kv_budget=20, kv_buffer=8, kv_window=4))
    orders = bench.step()
    (accumulation,), (compaction,) = orders.accumulations, orders.compactions
    assert accumulation == ("a", 28, 28, 23, compaction.source_blocks)
    assert orders.records_queries


def test_a_preempted_request_starts_over_and_its_client_learns_of_both_lives():
    bench = bench_with("a")
    bench.step()
    assert bench.preempt() == "a"
    record = bench.requests["a"]
    assert record.planner.num_compactions == 0
    # Until it resumes, the report is that of its first life.
    assert vars(record.evictions) == {"policy": "rkv", "compactions": 1, "evicted_tokens": 8, "lives": 1}
    record.num_evicted = 0
    bench.run("a", 10)
    bench.step(first=("a",))
    assert vars(record.evictions) == {"policy": "rkv", "compactions": 0, "evicted_tokens": 0, "lives": 2}


def test_the_end_of_a_request_removes_its_record_and_returns_its_report():
    bench = bench_with("a")
    bench.step()
    report = bench.controller.finish("a", Text([1, 2], [7, 8]), {"remote": 1})
    evictions = {"policy": "rkv", "compactions": 1, "evicted_tokens": 8, "lives": 1}
    assert report == {"remote": 1, CONFIG_KEY: evictions}
    assert bench.recorder.events[-1] == ("finished", "a", "7", "8")
    assert not bench.requests


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("policy", ["skipkv", "h2o", "thinkv"])
def test_a_request_that_cannot_reach_its_bound_takes_no_state(policy, is_traced):
    """It is prefilled in one piece, takes all that is cached, and its client hears of no compaction."""
    trace = {"kv_trace_dir": "/traces"} if is_traced else {}
    config = KVPolicyConfig(kv_policy=policy, kv_budget=20, kv_buffer=8, kv_window=4, kv_protect_prompt=False, **trace)
    bench = Bench(config)
    resolved = RequestOptions().resolve(config, 6)
    for name, end in (("short", 28), ("long", 29)):
        bench.controller.arrive(name, resolved, resolved.demand(end + 1, BLOCK), end, [1])
    short, long = (bench.requests[name] for name in ("short", "long"))
    assert (short.is_managed, long.is_managed) == (is_traced, True)
    assert short.limit_cached(1000) == (1000 if not is_traced else long.limit_cached(1000))
    for name in ("short", "long"):
        bench.run(name, 20)
    orders = bench.step(first=("short", "long"))
    assert [order.request_id for order in orders.started] == (["short", "long"] if is_traced else ["long"])
    assert short.planner.room(6, 0) >= 28 - 6
    for _ in range(8):
        orders = bench.step()
        assert "short" not in {order.request_id for order in (*orders.accumulations, *orders.compactions)}
    report = bench.controller.finish("short", Text([], []), None)
    assert (report[CONFIG_KEY]["policy"], report[CONFIG_KEY]["compactions"]) == (policy, 0)


@pytest.mark.parametrize("is_steered", [True, False])
def test_a_request_that_keeps_everything_reports_its_steering_only(is_steered):
    bench = Bench()
    record = bench.arrive("a", 6, KEEP_EVERYTHING)
    if is_steered:
        record.steering = SteeredRequest("a", 6, [], Strength(1, 0.5, 2))
        record.thoughts = Thoughts(12, 3, 2, 1)
    report = bench.controller.finish("a", Text([], []), None)
    if is_steered:
        thoughts = {"steered_tokens": 12, "execution": 3, "reflection": 2, "transition": 1}
        steering = {"vector": None, "alpha0": 1, "gamma": 0.5} | thoughts
        assert report == {CONFIG_KEY: {"policy": "full", "steering": steering}}
    else:
        assert report is None


def test_the_report_counts_resident_and_logical_tokens():
    bench = bench_with("a", "b")
    bench.step()
    report = bench.controller.report(bench.running)
    assert (report["logical_tokens"], report["resident_tokens"], report["promised_pages"]) == (58, 42, 7)
    bench.controller.idle()
    bench.controller.close()
    assert bench.recorder.events[-3:] == [("before report",), ("idle",), ("close",)]


@pytest.mark.parametrize("too_many", ["tokens", "blocks"])
def test_check_bounds_can_fail(too_many):
    bench = bench_with("a")
    bench.controller.check_bounds(bench.running)
    if too_many == "tokens":
        bench.running[0].num_computed_tokens = 29
    else:
        bench.blocks.tables["a"].append(99)
    with pytest.raises(AssertionError, match=f"of at most .* {too_many}"):
        bench.controller.check_bounds(bench.running)


# ---- what a request may take from the prefix cache


@pytest.mark.parametrize(
    ("policy", "protects", "most_cached"),
    [("rkv", True, 24), ("skipkv", True, 8), ("skipkv", False, 0), ("h2o", True, 8), ("thinkv", True, 8)],
)
def test_tokens_whose_text_or_queries_are_needed_are_computed(policy, protects, most_cached):
    config = KVPolicyConfig(kv_policy=policy, kv_budget=20, kv_buffer=8, kv_window=4, kv_protect_prompt=protects)
    resolved = RequestOptions().resolve(config, 10)
    record = RequestRecord.make("a", resolved, resolved.demand(500, BLOCK), end=500, num_queries=32, block_size=BLOCK)
    assert record.most_cached == most_cached
    assert record.limit_cached(most_cached) == most_cached
    assert not record.recomputes_sentences
    assert record.limit_cached(most_cached + BLOCK) == most_cached
    assert record.recomputes_sentences == (not protects)
