"""Counts for the metrics of the server."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.orders import Compaction, Started
from ..core.reports import RecalledTokens
from ..steering.controller import KINDS
from .requests import RequestListener, RequestRecord, Text

SKIPPED, THOUGHTS, TRACES_DROPPED = "skipped:", "thoughts:", "traces_dropped:"
"""Prefixes of names in a report. The rest of the name is a reason, a kind of thought, and a reason."""


RECALLED = ("recalled_tokens", "recall_checked_tokens", "recall_used_tokens")
"""Names of the fields of `RecalledTokens` in a report."""


class EvictionStats(RequestListener):
    """Counts since the last report. The report travels with vLLM's `SchedulerStats` as a flat dict."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._peak_blocks = 0
        self._recalled = RecalledTokens()

    def started(self, request: RequestRecord, order: Started) -> None:
        """Count what the policy cannot do as configured for this request."""
        limits = request.resolved.limits
        if limits is not None and limits.keep > limits.budget:
            self.skipped("prompt_exceeds_budget")
        if request.recomputes_sentences:
            self.skipped("cached_prompt_sentences")

    def compacted(self, request: RequestRecord, order: Compaction) -> None:
        """Count a compaction that is sent to the workers."""
        self._add("compactions", 1)
        self._add("evicted_tokens", order.num_resident - order.num_keep)
        self._add("freed_pages", len(order.source_blocks) - len(order.target_blocks))
        if order.lookahead_blocks:
            self._add("probes", 1)

    def finished(self, request: RequestRecord, text: Text) -> None:
        """Count the thoughts of a steered request, and the tokens at which it was steered."""
        thoughts = request.thoughts
        if thoughts is None:
            return
        self._add("steered_tokens", thoughts.steered_tokens)
        for kind in KINDS:
            self._add(THOUGHTS + kind, getattr(thoughts, kind))

    def skipped(self, reason: str) -> None:
        """Count something that the policy could not do, or not as configured."""
        self._add(SKIPPED + reason, 1)

    def postponed(self, number: int) -> None:
        """Count requests that waited a step for their compaction."""
        self._add("postponed_compactions", number)

    def trimmed_drafts(self, number: int) -> None:
        """Count drafts that were left out of a step so that the request does not pass its bound."""
        if number:
            self._add("trimmed_drafts", number)

    def recalled(self, counts: RecalledTokens) -> None:
        """Note how many tokens have come back since the workers started."""
        for name, before, now in zip(RECALLED, self._recalled, counts, strict=True):
            self._add(name, now - before)
        self._recalled = counts

    def dropped_stored(self, number: int) -> None:
        """Count evicted tokens that are gone for ever, because the host memory was full."""
        self._add("dropped_stored_tokens", number)

    def traces_dropped(self, reasons: Mapping[str, int]) -> None:
        """Count traces that could not be written, by reason."""
        for reason, count in reasons.items():
            self._add(TRACES_DROPPED + reason, count)

    def blocks_in_use(self, num_blocks: int) -> None:
        """Note how many blocks all requests hold in a step."""
        self._peak_blocks = max(self._peak_blocks, num_blocks)

    def take(self, num_logical: int, num_resident: int, num_promised: int, num_stored: int = 0) -> dict[str, float]:
        """Return the counts since the last call, with the current gauges.

        Args:
            num_logical: tokens that running requests have computed.
            num_resident: tokens that they hold.
            num_promised: blocks that they were promised.
            num_stored: their tokens in host memory.
        """
        counts, self._counts = self._counts, {}
        gauges = {"logical_tokens": num_logical, "resident_tokens": num_resident, "promised_pages": num_promised}
        gauges["stored_tokens"] = num_stored
        return counts | gauges | {"peak_pages": self._peak_blocks}

    def _add(self, name: str, amount: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount
