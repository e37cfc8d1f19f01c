"""The groups that are not compacted, in `engine`: layers with a sliding window, and layers that keep a state.

A state is known by what was written last: its block holds the tokens since the last multiple of the block size, and
nothing behind them. So the state after a whole block of tokens looks like a block of their KV.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request

from skipkv_vllm.core.limits import ceil_div
from tests.unit.integration.tokens import MAX_MODEL_LEN, PAGE, Tracked

if TYPE_CHECKING:
    from tests.unit.integration.engine import Engine


def state_spec(has_prefix_cache: bool) -> MambaSpec:
    """Return a layer that keeps a state, as vLLM describes it."""
    return MambaSpec(
        block_size=PAGE if has_prefix_cache else MAX_MODEL_LEN,
        shapes=((4, 16),),
        dtypes=(torch.float32,),
        mamba_cache_mode="align" if has_prefix_cache else "none",
    )


def aligned(request: Request, start: int, count: int, chunk: int) -> int:
    """Return how many tokens vLLM's scheduler computes, so that states are there where blocks end."""
    scheduler = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=PAGE),
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        block_size=PAGE,
        hash_block_size=PAGE,
        max_num_scheduled_tokens=chunk,
        mamba_has_prefill_checkpoint_blocks=False,
        mamba_partial_cache_hit=False,
        mamba_prefill_checkpoint_alignment=None,
        mamba_shared_prefix_checkpoint=False,
        use_eagle_block_drop=False,
        num_hash_lookahead_tokens=0,  # of vLLM 0.33
    )
    split: Any = Scheduler._mamba_block_aligned_split
    number: int = split(scheduler, request, count, start - request.num_computed_tokens)
    return number


def write(engine: Engine, request_id: str, manager: SingleTypeKVCacheManager, first: int, count: int) -> None:
    """Write new tokens that the request has noted."""
    tracked, blocks = engine.tracked[request_id], manager.req_to_blocks[request_id]
    if not isinstance(manager, MambaManager):
        for position in range(first, first + count):
            page = blocks[position // PAGE].block_id
            engine.assert_writable(request_id, page, manager)
            engine.pages[page][position % PAGE] = tracked.written[position]
        return
    if first:
        source = blocks[(first - 1) // manager.block_size]
        assert not source.is_null, f"{request_id}'s state is lost"
        assert engine.pages[source.block_id] == _state(tracked, first), f"{request_id} goes on from another state"
    page = blocks[(first + count - 1) // manager.block_size].block_id
    engine.assert_writable(request_id, page, manager)
    engine.pages[page] = _state(tracked, first + count)


def _state(tracked: Tracked, num_tokens: int) -> list[Any]:
    """Return the content of the block of the state after so many tokens."""
    begin = (num_tokens - 1) // PAGE * PAGE
    tokens = [tracked.written[position] for position in range(begin, num_tokens)]
    return [*tokens, *[None] * (PAGE - len(tokens))]


def check(engine: Engine, request_id: str, manager: SingleTypeKVCacheManager) -> None:
    """Check that a group holds what the next token reads."""
    tracked = engine.tracked[request_id]
    num_computed, blocks = tracked.request.num_computed_tokens, manager.req_to_blocks[request_id]
    assert len(blocks) == ceil_div(num_computed, manager.block_size)
    if isinstance(manager, MambaManager):
        held = [block for block in blocks if not block.is_null]
        assert blocks[-1] in held
        assert engine.pages[blocks[-1].block_id] == _state(tracked, num_computed), f"{request_id}'s state is another's"
        return
    for position in range(max(0, num_computed - manager.sliding_window + 1), num_computed):
        content = engine.pages[blocks[position // PAGE].block_id][position % PAGE]
        assert content == tracked.written[position], f"{request_id}'s window is not what it wrote"
