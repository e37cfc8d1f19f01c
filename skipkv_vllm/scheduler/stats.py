"""Count what was evicted, for the metrics of the server and for the client of each request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.orders import Compaction
from ..steering.controller import KINDS, Thoughts

SKIPPED = "skipped:"


THOUGHTS = "thoughts:"


TRACES_DROPPED = "traces_dropped:"


@dataclass
class RequestEvictions:
    """What happened to one request; its client reads it as `kv_transfer_params["skipkv"]` of the response.

    Attributes:
        policy: the method that was applied.
        compactions: how often tokens were evicted since it last started.
        evicted_tokens: how many in all of these.
        lives: how often it started: once, and again after each preemption, which takes all its KV.
    """

    policy: str
    compactions: int = 0
    evicted_tokens: int = 0
    lives: int = 1

    def compacted(self, compaction: Compaction) -> None:
        """Count a compaction."""
        self.compactions += 1
        self.evicted_tokens += compaction.num_resident - compaction.num_keep


class EvictionStats:
    """What happened since the last report; travels with vLLM's `SchedulerStats` as a flat dict."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._peak_pages = 0

    def _add(self, name: str, amount: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def compacted(self, compaction: Compaction) -> None:
        """Count a compaction that was sent to the workers."""
        self._add("compactions", 1)
        self._add("evicted_tokens", compaction.num_resident - compaction.num_keep)
        self._add("freed_pages", len(compaction.source_blocks) - len(compaction.target_blocks))
        if compaction.lookahead_blocks:
            self._add("probes", 1)

    def skipped(self, reason: str) -> None:
        """Count something the policy should have done and could not, or not as configured."""
        self._add(SKIPPED + reason, 1)

    def thought(self, thoughts: Thoughts) -> None:
        """Count what a steered request that ended thought, and how often it was steered."""
        self._add("steered_tokens", thoughts.steered_tokens)
        for kind in KINDS:
            self._add(THOUGHTS + kind, getattr(thoughts, kind))

    def dropped_traces(self, reasons: Mapping[str, int]) -> None:
        """Count traces that could not be written."""
        for reason, count in reasons.items():
            self._add(TRACES_DROPPED + reason, count)

    def holding(self, num_pages: int) -> None:
        """Pages held by all requests in a step."""
        self._peak_pages = max(self._peak_pages, num_pages)

    def take(self, num_logical: int, num_resident: int, num_promised: int) -> dict[str, float]:
        """The report since the last one, with the current gauges."""
        counts, self._counts = self._counts, {}
        gauges = {"logical_tokens": num_logical, "resident_tokens": num_resident, "promised_pages": num_promised}
        return counts | gauges | {"peak_pages": self._peak_pages}
