"""Metrics: the scheduler's counters, and their series in Prometheus."""

from __future__ import annotations

from types import SimpleNamespace

import prometheus_client
import pytest
from vllm.v1.metrics.stats import SchedulerStats

from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.orders import Compaction, Started
from skipkv_vllm.integration import compat, metrics
from skipkv_vllm.integration.metrics import EvictionStatLogger
from skipkv_vllm.scheduler.requests import RequestRecord
from skipkv_vllm.scheduler.stats import EvictionStats

WITH_POLICY = SimpleNamespace(additional_config={"skipkv": {}})
WITHOUT = SimpleNamespace(additional_config=None)


def compaction(resident: int, keep: int, source: int, target: int) -> Compaction:
    return Compaction("a", 500, resident, keep, list(range(source)), list(range(target)), 0)


def record(num_prompt: int = 4, recomputes_sentences: bool = False) -> RequestRecord:
    """A request of a server with a budget of 96 tokens."""
    resolved = RequestOptions().resolve(KVPolicyConfig(kv_policy="skipkv", kv_budget=96), num_prompt)
    made = RequestRecord.make("a", resolved, resolved.demand(500, 16), end=500, num_queries=8, block_size=16)
    made.recomputes_sentences = recomputes_sentences
    return made


def start(num_prompt: int = 4, recomputes_sentences: bool = False) -> tuple[RequestRecord, Started]:
    return record(num_prompt, recomputes_sentences), Started("a", "skipkv", num_prompt, num_prompt, num_prompt)


# ---- the scheduler's counters


def test_compactions_are_counted_and_reported_once():
    stats = EvictionStats()
    stats.compacted(record(), compaction(144, 16, 9, 1))
    stats.compacted(record(), compaction(100, 60, 7, 4))
    report = stats.take(1000, 300, 24)
    counters = {"compactions": 2, "evicted_tokens": 128 + 40, "freed_pages": 8 + 3}
    assert report == report | counters | {"logical_tokens": 1000, "resident_tokens": 300, "promised_pages": 24}
    # The counters were handed over, so only gauges remain.
    again = stats.take(5, 4, 1)
    assert not again.keys() & counters.keys()
    assert (again["logical_tokens"], again["resident_tokens"]) == (5, 4)


def test_prompts_that_were_compacted_by_tokens_decoded_ahead_are_counted():
    stats = EvictionStats()
    stats.compacted(record(), compaction(144, 16, 9, 1)._replace(lookahead_blocks=[20, 21]))
    stats.compacted(record(), compaction(144, 16, 9, 1))
    report = stats.take(0, 0, 0)
    assert (report["compactions"], report["probes"]) == (2, 1)


def test_the_peak_of_pages_outlives_reports():
    stats = EvictionStats()
    assert stats.take(0, 0, 0)["peak_pages"] == 0
    for num_blocks in (3, 9, 4):
        stats.blocks_in_use(num_blocks)
    assert stats.take(0, 0, 0)["peak_pages"] == 9
    stats.blocks_in_use(5)
    assert stats.take(0, 0, 0)["peak_pages"] == 9


def test_skips_are_counted_by_reason():
    stats = EvictionStats()
    stats.started(*start(recomputes_sentences=True))
    stats.started(*start(num_prompt=88, recomputes_sentences=True))
    stats.started(*start(num_prompt=89))
    report = stats.take(0, 0, 0)
    assert report["skipped:cached_prompt_sentences"] == 2
    assert report["skipped:prompt_exceeds_budget"] == 1


def test_dropped_traces_are_counted_by_reason():
    stats = EvictionStats()
    stats.traces_dropped({"backlog": 2})
    stats.traces_dropped({"backlog": 1, "missing_part": 1})
    report = stats.take(0, 0, 0)
    assert (report["traces_dropped:backlog"], report["traces_dropped:missing_part"]) == (3, 1)


# ---- series in Prometheus


@pytest.fixture
def registry(monkeypatch) -> prometheus_client.CollectorRegistry:
    """A registry of this test's own, without earlier counts."""
    registry = prometheus_client.CollectorRegistry()
    for name in ("Counter", "Gauge"):
        original = getattr(prometheus_client, name)

        def create(self, *args, _original=original, **kwargs):
            _original.__init__(self, *args, registry=registry, **kwargs)

        # Same name and base class, so that the module's `isinstance` checks hold.
        monkeypatch.setattr(metrics, name, type(name, (original,), {"__init__": create}))
    monkeypatch.setattr(EvictionStatLogger, "_metrics", None)
    return registry


def value(registry, name: str, engine: str = "0", **labels: str) -> float | None:
    return registry.get_sample_value(name, {"engine": engine, **labels})


def report(logger: EvictionStatLogger, **counts: float) -> None:
    stats = SimpleNamespace()
    compat.send_report(stats, counts)
    logger.record(stats, None)


def test_counters_add_up_and_gauges_are_replaced(registry):
    logger = EvictionStatLogger(WITH_POLICY)
    report(logger, compactions=2, evicted_tokens=168, freed_pages=11, logical_tokens=1000, resident_tokens=300)
    report(logger, compactions=1, evicted_tokens=10, freed_pages=0, logical_tokens=50, resident_tokens=40)
    assert value(registry, "skipkv_compactions_total") == 3
    assert value(registry, "skipkv_evicted_tokens_total") == 178
    assert value(registry, "skipkv_freed_pages_total") == 11
    assert value(registry, "skipkv_logical_tokens") == 50
    assert value(registry, "skipkv_resident_tokens") == 40


def test_skips_carry_their_reason(registry):
    logger = EvictionStatLogger(WITH_POLICY)
    report(logger, **{"skipped:cached_prompt_sentences": 3, "skipped:prompt_exceeds_budget": 1})
    report(logger, **{"skipped:cached_prompt_sentences": 1})
    assert value(registry, "skipkv_skipped_total", reason="cached_prompt_sentences") == 4
    assert value(registry, "skipkv_skipped_total", reason="prompt_exceeds_budget") == 1


def test_engines_are_counted_apart(registry):
    first, second = EvictionStatLogger(WITH_POLICY, 0), EvictionStatLogger(WITH_POLICY, 1)
    report(first, compactions=1)
    report(second, compactions=5)
    assert value(registry, "skipkv_compactions_total", engine="0") == 1
    assert value(registry, "skipkv_compactions_total", engine="1") == 5


def test_everything_the_scheduler_reports_is_exported(registry):
    stats = EvictionStats()
    stats.compacted(record(), compaction(144, 16, 9, 1))
    stats.skipped("cached_prompt_sentences")
    logger = EvictionStatLogger(WITH_POLICY)
    report(logger, **stats.take(144, 16, 9))
    assert value(registry, "skipkv_evicted_tokens_total") == 128
    assert value(registry, "skipkv_logical_tokens") == 144
    assert value(registry, "skipkv_resident_tokens") == 16


def test_counters_are_visible_at_zero(registry):
    logger = EvictionStatLogger(WITH_POLICY, 3)
    assert value(registry, "skipkv_compactions_total", engine="3") is None
    logger.log_engine_initialized()
    for name in ("compactions_total", "evicted_tokens_total", "freed_pages_total", "resident_tokens", "logical_tokens"):
        assert value(registry, f"skipkv_{name}", engine="3") == 0


@pytest.mark.parametrize(("policy", "budget"), [({"kv_policy": "rkv", "kv_budget": 512}, 512), ({}, 0)])
def test_the_budget_is_shown_where_something_is_evicted(registry, policy, budget):
    logger = EvictionStatLogger(SimpleNamespace(additional_config={"skipkv": policy}))
    logger.log_engine_initialized()
    assert value(registry, "skipkv_budget_tokens") == budget


def test_no_name_begins_with_vllms_prefix(registry):
    EvictionStatLogger(WITH_POLICY)
    names = [metric.name for metric in registry.collect()]
    assert {"skipkv_compactions", "skipkv_skipped", "skipkv_resident_tokens"} <= set(names)
    assert all(name.startswith("skipkv_") for name in names)


def test_nothing_is_registered_without_a_policy(registry):
    logger = EvictionStatLogger(WITHOUT)
    report(logger, compactions=1)
    logger.log_engine_initialized()
    assert list(registry.collect()) == []


def test_steps_without_a_report_are_fine(registry):
    logger = EvictionStatLogger(WITH_POLICY)
    empty = SchedulerStats()
    compat.send_report(empty, {})
    for stats in (None, SchedulerStats(), empty):
        logger.record(stats, None)
    assert value(registry, "skipkv_compactions_total") is None


def test_a_report_that_nobody_knows_costs_nothing_else(registry):
    logger = EvictionStatLogger(WITH_POLICY)
    report(logger, unheard_of=1, compactions=-3, evicted_tokens=5)
    assert value(registry, "skipkv_evicted_tokens_total") == 5
    assert value(registry, "skipkv_compactions_total") == 0


def test_metrics_that_cannot_be_made_do_not_stop_a_server(registry, monkeypatch):
    def broken():
        raise OSError("the folder of the metrics is gone")

    monkeypatch.setattr(metrics, "_make_metrics", broken)
    logger = EvictionStatLogger(WITH_POLICY)
    report(logger, compactions=1)
    logger.log_engine_initialized()


def test_a_client_whose_configuration_came_from_elsewhere_switches_the_seams_on(monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    from skipkv_vllm.integration.compat import hooks, is_public, request_checks

    if is_public("request check") and is_public("reports to metrics"):
        assert InputProcessor.request_validators == [request_checks.check_request]
        return
    enabled = []
    monkeypatch.setattr(hooks, "enable", enabled.append)
    for config in (WITH_POLICY, WITHOUT):
        # The rest of the configuration is missing, so vLLM's own part fails.
        with pytest.raises(AttributeError):
            InputProcessor(config)
    assert enabled == [WITH_POLICY]


def test_a_client_sums_reports_only_with_a_policy(registry, monkeypatch):
    installed = []
    monkeypatch.setattr(metrics, "install_reports", lambda: installed.append(True))
    EvictionStatLogger(WITHOUT)
    assert installed == []
    EvictionStatLogger(WITH_POLICY)
    assert installed == [True]
