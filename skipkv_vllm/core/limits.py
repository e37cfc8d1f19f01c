"""How many tokens and blocks one request may hold: counts only."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

from .needs import NUM_ASKING


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


STORED_PAGE = 64
"""Tokens of a page of the token store, in all layers and heads."""

BEFORE_END = (8, 4, 1)
"""Tokens before the end of a prompt at which evicted ones come back. The last one is the first that may answer; what it
asks for depends on what those before it found."""


class LookaheadTokens(NamedTuple):
    """Tokens of a request while others are computed ahead for it.

    Attributes:
        held: tokens that it holds then.
        extra: tokens that need lookahead blocks.
    """

    held: int = 0
    extra: int = 0


class RecallLimits(NamedTuple):
    """How many evicted tokens of a request may come back, and when.

    Attributes:
        share: of the tokens that a compaction keeps, without protected prompt and window.
        interval: decoded tokens between two swaps.
        num_prompt: length of the prompt. Before its end those come back that its last tokens ask for.
        num_sinks: first tokens that its method never evicts.
    """

    share: float
    interval: int
    num_prompt: int
    num_sinks: int = 0


@dataclass(frozen=True)
class Limits:
    """How many tokens one request may hold.

    Attributes:
        budget: B, the length it is compacted to.
        buffer: b, how far it may grow beyond the budget.
        window: W, number of newest tokens that always survive.
        protected: prompt length if the prompt is protected, else 0.
        deferred: tokens held whole before the first eviction, if that is more than the bound.
        prompt_end: length of a prompt that is compacted as soon as it is computed, provided it is longer than what is
            kept; else 0.
        num_draft: tokens decoded ahead at that compaction, on a temporary copy.
        num_question: tokens of the question that is appended at each compaction before the prompt's end; else 0.
        recall: which evicted tokens may come back, and when; None if none may.
    """

    budget: int
    buffer: int
    window: int
    protected: int
    deferred: int = 0
    prompt_end: int = 0
    num_draft: int = 0
    num_question: int = 0
    recall: RecallLimits | None = None

    @property
    def keep(self) -> int:
        """Resident length after a compaction: the budget, or prompt + window where that is more."""
        return max(self.budget, self.protected + self.window)

    @property
    def num_recalled(self) -> int:
        """Most tokens that come back, of those that a compaction keeps."""
        if self.recall is None:
            return 0
        num_free = self.keep - max(self.protected, self.recall.num_sinks) - self.window
        return int(self.recall.share * num_free)

    @property
    def num_queries(self) -> int:
        """Newest queries that a compaction or swap reads."""
        return self.window if self.recall is None else max(self.window, NUM_ASKING)

    @property
    def bound(self) -> int:
        """Resident length that triggers a compaction."""
        return self.keep + self.buffer

    @property
    def first_bound(self) -> int:
        """Resident length that triggers the first compaction at the latest; the request never holds more."""
        return max(self.bound, self.deferred)

    @property
    def first_due(self) -> int:
        """Length at which the first compaction takes place."""
        return min(self.first_bound, self.prompt_end if self.prompt_end > self.keep else self.first_bound)

    @property
    def lookahead(self) -> LookaheadTokens:
        """Tokens at the compaction with the most lookahead; zeros if nothing is computed ahead."""
        if self.num_draft and self.prompt_end > self.keep:
            return LookaheadTokens(min(self.prompt_end, self.first_bound), self.num_lookahead(self.prompt_end))
        if self.num_question and self.prompt_end > self.first_bound:
            return LookaheadTokens(self.first_bound, self.num_question)
        return LookaheadTokens()

    def num_lookahead(self, num_logical: int) -> int:
        """Tokens of the lookahead blocks of a compaction: those computed ahead, and the copy of the cache they need."""
        if num_logical < self.prompt_end:
            return self.num_question
        return self.keep + self.num_draft if self.num_draft and num_logical == self.prompt_end else 0

    @property
    def cacheable(self) -> int:
        """Tokens it may take from the prefix cache; the last before a compaction are computed for their queries."""
        return max(0, self.first_due - self.num_queries)


def most_tokens(limits: Limits | None, longest: int) -> int:
    """Return the most tokens that a request of at most `longest` tokens ever holds at once."""
    return longest if limits is None else min(limits.first_bound, longest)


class DraftSlots(NamedTuple):
    """Slots that drafts of speculative decoding may take beyond the tokens of a request.

    Attributes:
        number: most of them.
        max_length: length of a request beyond which none is taken.
    """

    number: int = 0
    max_length: int = sys.maxsize

    def beyond(self, num_tokens: int) -> int:
        """Return the most slots that a request of so many tokens takes, drafts included."""
        return max(num_tokens, min(num_tokens + self.number, self.max_length))


NO_DRAFTS = DraftSlots()


class OtherGroup(NamedTuple):
    """A group of layers whose cache is not compacted: they read a window of the text only, or keep a state of it.

    Attributes:
        block_size: tokens of a block.
        most_blocks: most blocks that a request holds, without those of a prompt in flight.
        at_rest: most blocks that it holds between two steps once it has given those of its prompt back.
        per_step: blocks that each further step in flight holds, if their number does not depend on its tokens.
    """

    block_size: int
    most_blocks: int
    at_rest: int
    per_step: int | None = None

    def num_blocks(self, num_tokens: int) -> int:
        """Return the most blocks that a request of so many tokens holds, without those of a prompt in flight."""
        return min(ceil_div(num_tokens, self.block_size), self.most_blocks)

    def peak(self, num_tokens: int, in_flight: int, num_steps: int) -> int:
        """Return the most blocks that it holds while `in_flight` tokens of `num_steps` steps are in flight.

        Blocks are given back once a step is computed, so those of the steps in flight come on top.
        """
        more = ceil_div(in_flight, self.block_size) if self.per_step is None else self.per_step * (num_steps - 1)
        return min(ceil_div(num_tokens, self.block_size), self.most_blocks + more)


def window_group(window: int, block_size: int) -> OtherGroup:
    """Return a group of layers that read the newest `window` tokens.

    vLLM frees a block when no token that is still to be computed reads it. So a request holds a stretch of the window
    and the tokens in flight, which may begin and end within a block; decoding, fewer tokens than a block are in flight.
    """
    most_blocks = ceil_div(window - 1, block_size) + 2
    return OtherGroup(block_size, most_blocks, at_rest=most_blocks)


def state_group(block_size: int, *, has_prefix_cache: bool, num_extra: int = 0) -> OtherGroup:
    """Return a group of layers that keep a state of the text, each in one block whatever the text's length.

    For the prefix cache vLLM leaves the state at the end of every `block_size` tokens in a block of its own. A request
    goes on from the last of them in a fresh block, and gives the old one back once the step that read it is computed.

    Args:
        block_size: see above.
        has_prefix_cache: whether there is a prefix cache.
        num_extra: blocks that a layer's prefill needs beside these.
    """
    if not has_prefix_cache:
        return OtherGroup(block_size, 1 + num_extra, at_rest=1, per_step=0)
    return OtherGroup(block_size, 2 + num_extra, at_rest=1, per_step=1)


class OtherGroups(NamedTuple):
    """The groups that are not compacted; they take blocks from the same pool.

    Attributes:
        groups: see above.
        max_in_flight: most tokens, of all requests together, that are scheduled and not yet computed.
        num_steps: most steps that are.
    """

    groups: tuple[OtherGroup, ...] = ()
    max_in_flight: int = 0
    num_steps: int = 1

    def num_blocks(self, num_tokens: int) -> int:
        """Return the most blocks that a request of so many tokens holds here, without those of a prompt in flight."""
        return sum(group.num_blocks(num_tokens) for group in self.groups)

    def peaks(self, num_tokens: int, in_flight: int) -> tuple[int, ...]:
        """Return the most blocks that such a request holds in each group while `in_flight` tokens of it are in flight.

        See `OtherGroup.peak`.
        """
        in_flight = min(in_flight, self.max_in_flight)
        return tuple(group.peak(num_tokens, in_flight, self.num_steps) for group in self.groups)

    @property
    def at_rest(self) -> tuple[int, ...]:
        """Most blocks that a request holds in each group at rest; see `OtherGroup`."""
        return tuple(group.at_rest for group in self.groups)

    @property
    def kinds(self) -> str:
        """Describe the layers."""
        has_states = {group.per_step is not None for group in self.groups}
        names = {False: "a sliding window", True: "a state"}
        return "layers with " + " or ".join(names[kind] for kind in sorted(has_states))


NO_OTHERS = OtherGroups()
"""Of a model whose layers all have full attention."""


class Demand(NamedTuple):
    """The most that one request may need.

    Attributes:
        num_tokens: most tokens it ever holds.
        num_intact: number of leading blocks that it never writes to if the prefix cache has them.
        lookahead: see `Limits.lookahead`.
        num_beside: most blocks it holds in groups that are not compacted.
        peaks: most blocks that it holds in each of these groups, while its prompt is computed.
        at_rest: see `OtherGroup`, for each of these groups.
    """

    num_tokens: int
    num_intact: int
    lookahead: LookaheadTokens = LookaheadTokens()
    num_beside: int = 0
    peaks: tuple[int, ...] = ()
    at_rest: tuple[int, ...] = ()

    @property
    def num_in_flight(self) -> int:
        """Blocks that it holds beyond `num_beside` there, while its prompt is computed."""
        return sum(self.peaks) - self.num_beside

    def num_blocks(self, block_size: int) -> int:
        """Return the most blocks that it takes at once, once its prompt is computed."""
        held, extra = (ceil_div(num_tokens, block_size) for num_tokens in self.lookahead)
        return max(ceil_div(self.num_tokens, block_size), held + extra) + self.num_beside

    def most_blocks(self, block_size: int) -> int:
        """Return the most blocks that it takes at once, also while its prompt is computed."""
        return self.num_blocks(block_size) + self.num_in_flight
