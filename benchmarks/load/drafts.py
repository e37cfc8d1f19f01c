"""Speculative decoding of the engines that are compared: drafts by n-grams, and counts of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

NGRAM: dict[str, Any] = {
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4,
}  # fmt: skip
"""`speculative_config`: after the last two to four tokens of a text, what followed them earlier in it."""


DRAFT_ROOM = 2 * NGRAM["num_speculative_tokens"]
"""Tokens that `max_model_len` must exceed the longest request by.

In a step in which any request comes so close to `max_model_len` that drafts might pass it, vLLM proposes zeros to all.
"""


class Drafts(NamedTuple):
    """Draft tokens that were verified, and those of them that were accepted."""

    verified: int = 0
    accepted: int = 0

    def __add__(self, other: object) -> Drafts:
        """Return the sum of both counts."""
        if not isinstance(other, Drafts):
            return NotImplemented
        return Drafts(self.verified + other.verified, self.accepted + other.accepted)

    @property
    def share(self) -> float | None:
        """Share that was accepted; None without drafts."""
        return self.accepted / self.verified if self.verified else None


class DraftCounter:
    """Counts the drafts of each request of a scheduler, also of one that keeps no statistics.

    Attributes:
        by_request: id that the scheduler knows a request by -> its drafts.
    """

    def __init__(self, scheduler: Any) -> None:
        self.by_request: dict[str, Drafts] = defaultdict(Drafts)
        self._make_stats = scheduler.make_spec_decoding_stats
        scheduler.make_spec_decoding_stats = self._count

    def total(self) -> Drafts:
        """Return the drafts of all requests."""
        return sum(self.by_request.values(), Drafts())

    def _count(
        self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, request_id: str, **kwargs: Any
    ) -> Any:
        self.by_request[request_id] += Drafts(num_draft_tokens, num_accepted_tokens)
        return self._make_stats(stats, num_draft_tokens, num_accepted_tokens, *args, request_id=request_id, **kwargs)
