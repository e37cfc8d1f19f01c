"""The orders that the scheduler sends to the workers with a step, attached to vLLM's `SchedulerOutput`."""

from __future__ import annotations

from typing import NamedTuple


class Started(NamedTuple):
    """Start managing the cache of a request, or start over after a preemption.

    Attributes:
        request_id: the request.
        policy: name of its method.
        num_prompt: prompt length.
        protected: number of prompt tokens that must survive.
        first_tracked: logical position from which its sentences are tracked.
        num_question: length of the question at the prompt's end, if the request sets it; else 0.
    """

    request_id: str
    policy: str
    num_prompt: int
    protected: int
    first_tracked: int
    num_question: int = 0


class Accumulation(NamedTuple):
    """Measure the attention of a request's newest queries before the ring overwrites them.

    The workers add it to the sums of the held tokens or record how sparse it is, whichever the method needs.

    Attributes:
        request_id: the request.
        num_logical: tokens computed so far.
        num_resident: tokens held, in the first slots of `blocks`.
        num_queries: number of newest queries to measure, at most as many as the ring keeps.
        blocks: block ids.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_queries: int
    blocks: list[int]


class Stored(NamedTuple):
    """The tokens of a request in host memory, all that it computed behind its protected prompt.

    Attributes:
        first: position of the token at place 0 of the first page.
        begin: position of the first token that is copied there now.
        end: position behind the last token that is there then.
        pages: pages of the store, in order.
        number: most tokens that come back, in place of those that the method values least.
    """

    first: int
    begin: int
    end: int
    pages: list[int]
    number: int

    @property
    def num_tokens(self) -> int:
        """Tokens there then."""
        return self.end - self.first


class Compaction(NamedTuple):
    """Compact a request into the blocks that the block manager assigned.

    Attributes:
        request_id: the request.
        num_logical: tokens computed so far; the newest held token has position `num_logical - 1`.
        num_resident: tokens held before, in the first slots of `source_blocks`.
        num_keep: tokens held afterwards, in the first slots of `target_blocks`.
        source_blocks: block ids before.
        target_blocks: block ids afterwards; each is the previous block at the same index, or a fresh one.
        ordinal: number of earlier compactions of this request.
        lookahead_blocks: block ids for tokens computed ahead and for the copy of the cache they need, see
            `policies.LookaheadPlan`. No request owns these blocks and no other order of the step uses them.
        stored: tokens of the request in host memory; None if none comes back.
    """

    request_id: str
    num_logical: int
    num_resident: int
    num_keep: int
    source_blocks: list[int]
    target_blocks: list[int]
    ordinal: int
    lookahead_blocks: list[int] = []
    stored: Stored | None = None

    @property
    def num_evicted_before(self) -> int:
        """Tokens evicted by earlier compactions. The worker counts them too and checks that both agree."""
        return self.num_logical - self.num_resident

    @property
    def after(self) -> tuple[int, list[int]]:
        """Tokens held afterwards, and their blocks."""
        return self.num_keep, self.target_blocks


class Swap(NamedTuple):
    """Bring tokens of a request back that its newest queries ask for, in place of others.

    Attributes:
        request_id: the request.
        num_logical: tokens computed so far.
        num_resident: tokens held, in the first slots of `blocks`.
        blocks: block ids.
        stored: tokens of the request in host memory.
    """

    request_id: str
    num_logical: int
    num_resident: int
    blocks: list[int]
    stored: Stored

    @property
    def after(self) -> tuple[int, list[int]]:
        """Tokens held afterwards, and their blocks."""
        return self.num_resident, self.blocks


class Strength(NamedTuple):
    """Steering strength `alpha = min(alpha0 + gamma * N, alpha_max)`, N the number of non-execution thoughts."""

    alpha0: float
    gamma: float
    alpha_max: float


class SteeredRequest(NamedTuple):
    """Start steering a request, or start over after a preemption.

    Attributes:
        request_id: the request.
        first: logical position of the first token that may be steered.
        state: state of `ops.track_thoughts` before that token.
        strength: coefficients of the request.
    """

    request_id: str
    first: int
    state: list[int]
    strength: Strength


class StepOrders(NamedTuple):
    """The orders of one step, carried out before anything else of the step touches the cache.

    The worker first forgets the requests that vLLM reports as finished or preempted. Then it accumulates, compacts,
    swaps and starts, in this order.

    Attributes:
        compactions: requests to compact.
        started: requests that start or start over.
        accumulations: queries to measure.
        records_queries: whether a query of this step will be needed. With methods that accumulate no
            queries only those of the last W tokens before a compaction are.
        steered: requests whose steering starts or starts over.
        swaps: requests whose recalled tokens are exchanged.
    """

    compactions: list[Compaction]
    started: list[Started]
    accumulations: list[Accumulation] = []
    records_queries: bool = True
    steered: list[SteeredRequest] = []
    swaps: list[Swap] = []
