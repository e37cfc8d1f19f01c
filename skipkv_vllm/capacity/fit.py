"""Number of requests that fit, with and without eviction: arithmetic on shapes.

The banner, `skipkv plan` and the worker that reserves the memory all use these functions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import KEEP_EVERYTHING, KVPolicyConfig, RequestOptions
from ..core.limits import ceil_div
from .sizes import ModelShape, Pool, sidecars

SHARING = 2
"""As many times more requests may run as would fit if none shared blocks of the prefix cache; the others wait."""


def most_rows(config: KVPolicyConfig, pool: Pool) -> int:
    """Return how many requests that may be compacted can run at once; each has a row of state."""
    if config.kv_admission == "optimistic":
        return pool.max_num_seqs
    bound = config.kv_budget + config.kv_buffer
    held = ceil_div(pool.draft_slots.beyond(bound), pool.block_size)
    fit = pool.num_blocks // (held + pool.others.num_blocks(bound))
    return min(pool.max_num_seqs, max(1, SHARING * fit))


@dataclass(frozen=True)
class Capacity:
    """Requests that fit into a pool, and their memory.

    Attributes:
        kv_bytes: KV per token.
        sidecar_bytes: sidecars per token.
        sidecars: see `sidecars`.
        state_bytes: queries, sentences and gates per request.
        rows: requests for which there is state.
        block_size: tokens per block.
        blocks: blocks with the policy.
        blocks_full: blocks that the same memory would hold without it.
        bound: most tokens that a request with this prompt holds once it decodes.
        request_blocks: most blocks that it holds, lookahead blocks included.
        request_blocks_full: blocks that a request of this length holds at its end without the policy.
        length: that length.
        fit: requests that fit at their bound.
        fit_full: requests that fit at their full length without the policy.
        concurrency: requests that run at once with the policy: `fit`, at most `max_num_seqs`.
        concurrency_full: the same without the policy.
        break_even: shortest length from which a request takes less memory with the policy than without; a shorter
            request pays for its state and saves nothing.
        is_capped: whether `max_num_seqs`, not memory, limits the concurrency with the policy.
        beside: of the blocks of a request, those in groups that are not compacted.
        beside_kinds: what layers these are.
        in_flight: blocks that it holds there beyond these while its prompt is computed.
        room: most tokens that a request can keep if it evicts none.
        budget, buffer: of such a request.
    """

    kv_bytes: int
    sidecar_bytes: int
    sidecars: list[str]
    state_bytes: int
    rows: int
    block_size: int
    blocks: int
    blocks_full: int
    bound: int
    request_blocks: int
    request_blocks_full: int
    length: int
    fit: int
    fit_full: int
    concurrency: int
    concurrency_full: int
    break_even: int
    is_capped: bool
    beside: int = 0
    beside_kinds: str = ""
    in_flight: int = 0
    room: int = 0
    budget: int = 0
    buffer: int = 0

    @property
    def room_at_bound(self) -> int:
        """Tokens that fit the blocks that a request takes for those that are compacted, at its bound."""
        return ceil_div(self.bound, self.block_size) * self.block_size

    @property
    def request_bytes(self) -> int:
        """Most memory of a request with the policy, sidecars and state included."""
        return self.request_blocks * self.block_size * (self.kv_bytes + self.sidecar_bytes) + self.state_bytes

    @property
    def request_bytes_full(self) -> int:
        """Memory of a request at its end without the policy."""
        return self.request_blocks_full * self.block_size * self.kv_bytes

    @property
    def state(self) -> str:
        """Name the parts of `state_bytes`."""
        return "queries, sentences and gates" if "gate" in self.sidecars else "queries and sentences"

    def lines(self) -> list[str]:
        """Describe the capacity for the banner and `skipkv plan`."""
        fits = f"{self.fit:,} such requests fit at once instead of {self.fit_full:,}"
        if self.is_capped:
            fits += f"; max_num_seqs lets {self.concurrency:,} run"
            if self.concurrency_full < self.concurrency:
                fits += f" instead of {self.concurrency_full:,}"
        *others, last = self.sidecars
        beside = f"{', '.join(others)} and {last}" if others else last
        return [
            f"{self.kv_bytes:,} bytes of KV per token + {self.sidecar_bytes:,} for its {beside}, "
            f"{self.state_bytes / 2**20:.2f} MiB of {self.state} for each of {self.rows:,} requests at most",
            f"{self.blocks:,} blocks of {self.block_size} tokens; the same memory without a policy: "
            f"{self.blocks_full:,}",
            f"a request of {self.length:,} tokens holds at most {self.request_blocks:,} blocks instead of "
            f"{self.request_blocks_full:,}",
            *self._beside(),
            *self._rounding(),
            fits,
            f"break-even at {self.break_even:,} tokens (prompt and output): shorter requests take more memory with "
            "the policy than without",
        ]

    def _beside(self) -> list[str]:
        """Describe the groups that are not compacted, if there are any."""
        if not self.beside:
            return []
        return [
            f"{self.beside:,} of them are of {self.beside_kinds}, which are not compacted; while its prompt "
            f"is computed, it may hold {self.in_flight:,} more there"
        ]

    def _rounding(self) -> list[str]:
        """Say what a bound buys in blocks that are so large that a compaction may free none."""
        if self.block_size <= self.buffer:
            return []
        room = self.room_at_bound
        return [
            f"only whole blocks are freed: the bound of {self.bound:,} tokens takes {room // self.block_size:,} of "
            f"them, so nothing is freed of a request of up to {room:,} tokens, and --kv-budget "
            f"{self.budget + room - self.bound:,} takes no more"
        ]


def capacity(
    config: KVPolicyConfig, shape: ModelShape, pool: Pool, *, length: int | None = None, prompt: int = 0
) -> Capacity:
    """Compute how many requests fit.

    Args:
        config: a configuration that evicts.
        shape: shape of the model on one rank.
        pool: blocks and limits of the engine.
        length: length of a request at its end; by default the longest allowed.
        prompt: length of its prompt. A protected prompt that exceeds the budget raises the bound; one that is not
            protected may be held whole at first, or need lookahead blocks.
    """
    length = pool.max_length if length is None else length
    request = RequestOptions.parse(None, config, length).resolve(config, prompt)
    limits = request.limits
    assert limits is not None, "the policy evicts nothing"
    kv, sidecar, block = shape.kv_bytes, shape.sidecar_bytes(config.needs), pool.block_size
    rows = most_rows(config, pool)
    state = shape.state_bytes(config, rows, pool)
    state_of_one = ceil_div(state, rows)
    blocks_full = (pool.num_blocks * block * (kv + sidecar) + state) // (block * kv)
    demand = request.demand(length, block, pool.others, pool.draft_slots)
    full = KEEP_EVERYTHING.resolve(config, prompt).demand(length, block, pool.others, pool.draft_slots)
    request_blocks, request_blocks_full = demand.num_blocks(block), full.num_blocks(block)
    # While one prompt is computed, the other requests have finished theirs.
    fit = max(0, pool.num_blocks - demand.num_in_flight) // request_blocks
    fit_full = max(0, blocks_full - full.num_in_flight) // request_blocks_full
    beside_at_bound = pool.others.num_blocks(limits.bound)
    bytes_of_one = (ceil_div(limits.bound, block) + beside_at_bound) * block * (kv + sidecar) + state_of_one
    return Capacity(
        kv_bytes=kv,
        sidecar_bytes=sidecar,
        sidecars=sidecars(config.needs),
        state_bytes=state_of_one,
        rows=rows,
        block_size=block,
        blocks=pool.num_blocks,
        blocks_full=blocks_full,
        bound=limits.bound,
        request_blocks=request_blocks,
        request_blocks_full=request_blocks_full,
        length=length,
        fit=fit,
        fit_full=fit_full,
        concurrency=min(fit, pool.max_num_seqs),
        concurrency_full=min(fit_full, pool.max_num_seqs),
        break_even=(bytes_of_one // (block * kv) - beside_at_bound) * block + 1,
        is_capped=fit > pool.max_num_seqs,
        beside=demand.num_beside,
        beside_kinds=pool.others.kinds if demand.num_beside else "",
        in_flight=demand.num_in_flight,
        room=_room(config, pool),
        budget=limits.budget,
        buffer=limits.buffer,
    )


def _room(config: KVPolicyConfig, pool: Pool) -> int:
    """Return how many tokens a request can keep if it evicts none and runs alone."""

    def needed(num_tokens: int) -> int:
        everything = KEEP_EVERYTHING.resolve(config, 0)
        demand = everything.demand(num_tokens, pool.block_size, pool.others, pool.draft_slots)
        return demand.most_blocks(pool.block_size)

    return bisect_right(range(1, pool.num_blocks * pool.block_size + 1), pool.num_blocks, key=needed)


def reserved_rows(config: KVPolicyConfig, shape: ModelShape, memory: int, pool: Pool) -> int:
    """Return for how many requests to reserve state in `memory` bytes, which the pool takes the rest of.

    It is the smallest number that is enough for the pool that is left; the number of blocks in `pool` does not count.
    """

    def is_enough(rows: int) -> bool:
        left = shape.left_for_kv(memory - shape.row_bytes(config, rows, pool), config.needs)
        return most_rows(config, replace(pool, num_blocks=left // (pool.block_size * shape.kv_bytes))) <= rows

    return 1 + bisect_left(range(1, pool.max_num_seqs + 1), True, key=is_enough)


def blocks_with_policy(config: KVPolicyConfig, shape: ModelShape, memory: int, pool: Pool) -> int:
    """Return the KV blocks that fit into `memory` bytes beside the policy's state and sidecars; may be negative.

    The number of blocks in `pool` does not count.
    """
    state = shape.state_bytes(config, reserved_rows(config, shape, memory, pool), pool)
    # In the order of `integration.build.left_for_kv`: vLLM divides what that leaves into blocks.
    return shape.left_for_kv(memory - state, config.needs) // (pool.block_size * shape.kv_bytes)


def as_dict(found: Capacity) -> Mapping[str, int | bool | list[str]]:
    """Return the fields for JSON."""
    return dict(vars(found))
