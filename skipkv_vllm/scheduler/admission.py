"""What a request may ever hold, and the pages promised to running requests: counts only, no vLLM, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import KVPolicyConfig, RequestOptions
from ..core.limits import Demand, Limits


def limits_of(options: RequestOptions, config: KVPolicyConfig, num_prompt: int) -> Limits | None:
    """What a request may hold; None for one that keeps everything."""
    policy = options.resolve_policy(config)
    if policy.name == "full":
        return None
    budget = config.kv_budget if options.kv_budget is None else options.kv_budget
    protected = num_prompt if config.kv_protect_prompt else 0
    prompt_end = num_prompt if policy.compacts_prompt else 0
    deferred = prompt_end or num_prompt + config.kv_window
    return Limits(
        budget,
        config.kv_buffer,
        config.kv_window,
        protected,
        deferred if config.kv_defer_prompt else 0,
        prompt_end,
        0 if policy.lookahead_plan is None else policy.lookahead_plan.num_tokens,
        0
        if policy.lookahead_plan is None or policy.lookahead_plan.draft is not None
        else policy.num_question(config.kv_window),
    )


@dataclass
class Ledger:
    """Promises pages to requests, so that a running one always finds the page it needs.

    A request is promised every page it may ever hold. Pages of its protected prompt that it finds in the prefix
    cache are never replaced, so all requests that hold one share one promise. Other pages of the cache may have to be
    replaced by fresh ones at a compaction, so they count for each request; and because a page that two hold is
    promised twice, the fresh page is there when it is needed.

    Attributes:
        num_pages: pages of the pool that requests can use.
        page_size: tokens of a page.
        is_bounded: False promises pages without looking whether they are there.
        num_promised: pages promised to running requests.
    """

    num_pages: int
    page_size: int
    is_bounded: bool
    num_promised: int = 0
    _demands: dict[str, Demand] = field(default_factory=dict)
    _own: dict[str, int] = field(default_factory=dict)
    _shared: dict[str, Sequence[int]] = field(default_factory=dict)
    _holders: dict[int, int] = field(default_factory=dict)

    def declare(self, request_id: str, demand: Demand) -> None:
        """A request arrives. It is promised nothing yet."""
        self._demands[request_id] = demand

    def withdraw(self, request_id: str) -> None:
        """A request has left for good."""
        self.release(request_id)
        self._demands.pop(request_id, None)

    def demand(self, request_id: str) -> Demand:
        """What a declared request may need."""
        return self._demands[request_id]

    def fits(self, request_id: str, cached: Sequence[int]) -> bool:
        """Whether a waiting request can be promised what it may need.

        Args:
            request_id: a declared request.
            cached: pages that it found in the prefix cache, its first ones.
        """
        if not self.is_bounded:
            return True
        demand = self._demands[request_id]
        shared = cached[: demand.num_intact]
        needed = demand.num_blocks(self.page_size) - len(shared)
        # Each page is looked up only where the sum without them already fits.
        room = self.num_pages - self.num_promised - needed
        return room >= len(shared) or (room >= 0 and room >= sum(page not in self._holders for page in shared))

    def admit(self, request_id: str, cached: Sequence[int]) -> None:
        """Promise a request its pages; see `fits`."""
        demand = self._demands[request_id]
        shared = cached[: demand.num_intact]
        own = demand.num_blocks(self.page_size) - len(shared)
        self._own[request_id], self._shared[request_id] = own, shared
        self.num_promised += own
        for page in shared:
            holders = self._holders.get(page, 0)
            self._holders[page] = holders + 1
            self.num_promised += not holders

    def release(self, request_id: str) -> None:
        """A request gave its pages back, if it had any."""
        self.num_promised -= self._own.pop(request_id, 0)
        for page in self._shared.pop(request_id, ()):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self.num_promised -= 1

    def check_integrity(self, held: dict[str, int]) -> None:
        """Verify the promises.

        Args:
            held: pages that each running request holds.

        Raises:
            AssertionError: the sums are wrong, more was promised than there is, or a request holds more than that.
        """
        assert self.num_promised == sum(self._own.values()) + len(self._holders), "the promises do not add up"
        assert held.keys() == self._own.keys(), "pages are held without a promise, or promised to nobody"
        if not self.is_bounded:
            return
        assert self.num_promised <= self.num_pages, f"{self.num_promised} of {self.num_pages} pages are promised"
        for request_id, num_pages in held.items():
            promised = self._own[request_id] + len(self._shared[request_id])
            assert num_pages <= promised, f"{request_id} holds {num_pages} of {promised} promised pages"
