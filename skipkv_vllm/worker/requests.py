"""What a worker knows of its requests: one record per request, and the row of the persistent buffers it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..core.needs import Need
from ..core.orders import Accumulation, Compaction
from ..policies import Policy


class Region(NamedTuple):
    """Slots of a request in which tokens come back, from its last compaction to the next.

    Attributes:
        slots: int64 `[layers, H, n]`, that of the token that the method values least first.
        owners: int32 `[layers, H, n]`, positions of the tokens that the compaction left there.
    """

    slots: Tensor
    owners: Tensor


@dataclass
class ManagedRequest:
    """Host-side state of a request whose cache is managed.

    Attributes:
        row: its row in the buffers of the signals.
        policy: its method.
        needs: inputs that are collected for it.
        num_prompt: prompt length.
        protected: number of prompt tokens that must survive.
        num_placed: number of first slots whose positions are in the sidecar; later slots follow in order.
        num_compactions: compactions since it started.
        region: slots in which tokens come back.
        owner_sums: float32 `[layers, H, n, K]`, attention sums of the owners of these, while others are there; None
            before any are.
        question: position of the first stored token, and float32 `[N]`, evidence that the end of the prompt asked for
            each one; None unless it may be answered now.
        is_sketched: whether its keys have been measured for their sketches.
        first_draft: likeliest token after the prompt, if tokens are decoded ahead from it.
        lookahead_queries: queries of tokens computed ahead `[layers, n, Hq, D]`, for the compaction under way.
        num_question: how many of these belong to the question that is appended after the held tokens.
    """

    row: int
    policy: Policy
    needs: Need
    num_prompt: int = 0
    protected: int = 0
    num_placed: int = 0
    num_compactions: int = 0
    region: Region | None = None
    owner_sums: Tensor | None = None
    question: tuple[int, Tensor] | None = None
    is_sketched: bool = False
    first_draft: Tensor | None = None
    lookahead_queries: Tensor | None = None
    num_question: int = 0

    @property
    def first_summed(self) -> int:
        """First slot that has sums. Protected tokens stay in front and get no output error."""
        return self.protected if self.needs & Need.OUTPUT_ERROR else 0


class Job(NamedTuple):
    """A compaction and the state of its request before it."""

    order: Compaction
    request: ManagedRequest


class Reading(NamedTuple):
    """An accumulation and the state of its request."""

    order: Accumulation
    request: ManagedRequest


class Rows:
    """Gives each request a row of the persistent buffers while it runs.

    Args:
        number: requests that can run at once.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = list(reversed(range(number)))
        self._taken: dict[str, int] = {}

    def take(self, request_id: str) -> int:
        """Return the row of a request; a request without one gets a free one."""
        row = self._taken.get(request_id)
        if row is None:
            row = self._taken[request_id] = self._free.pop()
        return row

    def release(self, request_id: str) -> None:
        """Free the row of a request, if it has one."""
        row = self._taken.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def check_integrity(self) -> None:
        """Verify that each row is either free or taken by one request.

        Raises:
            AssertionError: a row was lost or is used twice.
        """
        assert sorted((*self._free, *self._taken.values())) == list(range(self.number)), "a row was lost"
