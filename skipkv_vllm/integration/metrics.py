"""Exports the scheduler's reports to Prometheus, in the process of the API server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from ..core.auxiliary import auxiliary
from ..scheduler.stats import SKIPPED, THOUGHTS, TRACES_DROPPED
from ..steering.controller import KINDS
from ..trace.collector import DROP_REASONS
from .compat import has_policy, install_client_check, install_reports, policy_config, received_report

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM loads this module in every process with an engine's client, before the rest of this package.
install_client_check()

LABELLED = {SKIPPED: "skipped", THOUGHTS: "thoughts", TRACES_DROPPED: "traces_dropped"}
"""Prefix of names in a report -> counter; the rest of the name is its label."""


class Metric(NamedTuple):
    """A series on `/metrics`.

    Attributes:
        kind: its type in Prometheus.
        text: its help.
        label: a label beside `engine`, or none.
    """

    kind: Literal["counter", "gauge"]
    text: str
    label: str = ""


METRICS = {
    "compactions": Metric("counter", "Compactions of running requests."),
    "evicted_tokens": Metric("counter", "Tokens whose KV was evicted."),
    "postponed_compactions": Metric(
        "counter", "Steps that requests waited because enough others were compacted; see --kv-compactions-per-step."
    ),
    "trimmed_drafts": Metric(
        "counter", "Draft tokens of speculative decoding that were not verified, so that a compaction is on time."
    ),
    "freed_pages": Metric("counter", "KV blocks freed by compactions."),
    "probes": Metric("counter", "Compactions scored by queries of lookahead tokens."),
    "recalled_tokens": Metric(
        "counter", "Evicted tokens that came back, a mean of layers and heads; see --kv-recall-memory."
    ),
    "recall_checked_tokens": Metric(
        "counter", "Those of them that were in place at the next exchange, before any compaction."
    ),
    "recall_used_tokens": Metric("counter", "Those of the checked ones that recent queries asked for there again."),
    "dropped_stored_tokens": Metric(
        "counter", "Evicted tokens that cannot come back, because the host memory for them was full."
    ),
    "skipped": Metric("counter", "Times the policy could not act as configured, by reason.", "reason"),
    "steered_tokens": Metric("counter", "Tokens that a steering vector was added to, of finished requests."),
    "thoughts": Metric("counter", "Sentences of finished steered requests, by kind.", "kind"),
    "traces_dropped": Metric("counter", "Traces that could not be written, by reason.", "reason"),
    "budget_tokens": Metric(
        "gauge", "Tokens that a request keeps unless it sets its own budget; 0 where nothing is evicted."
    ),
    "resident_tokens": Metric("gauge", "Tokens of running requests whose KV is held."),
    "logical_tokens": Metric("gauge", "Tokens that running requests have computed, evicted ones included."),
    "stored_tokens": Metric("gauge", "Tokens of running requests in host memory."),
    "promised_pages": Metric("gauge", "KV blocks promised to running requests."),
    "peak_pages": Metric("gauge", "Most KV blocks in use at once since the server started."),
}
"""Name in a report, without the prefix `skipkv_` -> its series. `metrics_page` makes the documentation of it."""


class EvictionStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: exports the reports of one engine.

    It does nothing on a server without a KV policy. Names do not begin with `vllm:`, because vLLM clears that prefix
    when it rebuilds its own metrics.
    """

    _metrics: dict[str, Any] | None = None

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0, *_: Any, **__: Any) -> None:
        self._engine = str(engine_index)
        if not has_policy(vllm_config):
            return
        # The configuration may come from another process, so this process may not have seen a policy before.
        install_reports()
        with auxiliary("update the metrics"):
            if EvictionStatLogger._metrics is None:
                EvictionStatLogger._metrics = _make_metrics()
            config = policy_config(vllm_config)
            budget = config.kv_budget if config.evicts else 0
            EvictionStatLogger._metrics["budget_tokens"].labels(self._engine).set(budget)

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Add one report to the metrics."""
        if self._metrics is None:
            return
        for name, value in (received_report(scheduler_stats) or {}).items():
            with auxiliary("update the metrics"):
                self._add(self._metrics, name, value)

    def _add(self, metrics: dict[str, Any], name: str, value: float) -> None:
        for prefix, counter in LABELLED.items():
            if name.startswith(prefix):
                metrics[counter].labels(self._engine, name.removeprefix(prefix)).inc(value)
                return
        if isinstance(metrics[name], Gauge):
            metrics[name].labels(self._engine).set(value)
        else:
            metrics[name].labels(self._engine).inc(value)

    def log_engine_initialized(self) -> None:
        """Export all counters at zero, so that a dashboard can tell "none" from "absent"."""
        known_labels = {"thoughts": KINDS, "traces_dropped": DROP_REASONS, "skipped": ()}
        for name, metric in (self._metrics or {}).items():
            if name not in known_labels:
                metric.labels(self._engine)
            for label in known_labels.get(name, ()):
                metric.labels(self._engine, label)


# A later vLLM may require further methods. This class must load there too, and do nothing without a policy.
EvictionStatLogger.__abstractmethods__ = frozenset()


def _make_metrics() -> dict[str, Any]:
    return {name: _make(name, each) for name, each in METRICS.items()}


def _make(name: str, metric: Metric) -> Counter | Gauge:
    labels = ["engine", *filter(None, [metric.label])]
    if metric.kind == "counter":
        return Counter(f"skipkv_{name}", metric.text, labels)
    return Gauge(f"skipkv_{name}", metric.text, labels, multiprocess_mode="mostrecent")
