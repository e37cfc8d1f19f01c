"""How many tokens and blocks one request may hold: counts only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Limits:
    """What one request may hold, in tokens.

    Attributes:
        budget: B, what it is compacted to.
        buffer: b, how far it may grow beyond that.
        window: W, newest tokens that always survive.
        protected: length of the prompt where it is protected, else 0.
        deferred: tokens that are held whole at first, before anything is evicted, where that is more than the bound.
        prompt_end: length of a prompt that is compacted as soon as it is computed, if it is longer than what is kept;
            else 0.
        num_ahead: tokens that are decoded ahead at that compaction, on a temporary copy.
        num_asked: tokens of a question that is appended at each compaction before that one; else 0.
    """

    budget: int
    buffer: int
    window: int
    protected: int
    deferred: int = 0
    prompt_end: int = 0
    num_ahead: int = 0
    num_asked: int = 0

    @property
    def keep(self) -> int:
        """Resident length after a compaction: the budget, or prompt + window where that is more."""
        return max(self.budget, self.protected + self.window)

    @property
    def bound(self) -> int:
        """Resident length that triggers a compaction."""
        return self.keep + self.buffer

    @property
    def first_bound(self) -> int:
        """Resident length that triggers the first compaction at the latest, and the most the request ever holds."""
        return max(self.bound, self.deferred)

    @property
    def first_due(self) -> int:
        """Length at which the first compaction takes place."""
        return min(self.first_bound, self.prompt_end if self.prompt_end > self.keep else self.first_bound)

    @property
    def probing(self) -> tuple[int, int]:
        """Most tokens held when others are computed ahead, and those for which pages are lent then; else 0."""
        if self.num_ahead and self.prompt_end > self.keep:
            return min(self.prompt_end, self.first_bound), self.lent(self.prompt_end)
        if self.num_asked and self.prompt_end > self.first_bound:
            return self.first_bound, self.num_asked
        return 0, 0

    def lent(self, num_logical: int) -> int:
        """Tokens for which pages are lent at a compaction: those computed ahead, and what is copied for them."""
        if num_logical < self.prompt_end:
            return self.num_asked
        return self.keep + self.num_ahead if self.num_ahead and num_logical == self.prompt_end else 0

    @property
    def cacheable(self) -> int:
        """Tokens it may take from the prefix cache: the last W before a compaction are computed, for their queries."""
        return self.first_due - self.window


def most_tokens(limits: Limits | None, longest: int) -> int:
    """Tokens that a request of at most `longest` tokens ever holds at once."""
    return longest if limits is None else min(limits.first_bound, longest)


class Demand(NamedTuple):
    """What one request may need.

    Attributes:
        num_tokens: most tokens it ever holds.
        num_intact: leading pages that it will never write to if it finds them in the prefix cache.
        probing: `Limits.probing`.
    """

    num_tokens: int
    num_intact: int
    probing: tuple[int, int] = (0, 0)

    def num_pages(self, page_size: int) -> int:
        """Most pages that it takes at once."""
        held, scratch = self.probing
        return max(ceil_div(self.num_tokens, page_size), ceil_div(held, page_size) + ceil_div(scratch, page_size))
