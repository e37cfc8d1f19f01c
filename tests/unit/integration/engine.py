"""vLLM's real `KVCacheManager` with the evicting block manager, driven as vLLM's scheduler drives it.

Compactions come first, then running requests (the last one is preempted if the pool is full), then waiting requests
with prefix-cache look-up. A faithful worker writes and moves tokens in a dictionary of blocks.

A token's content is its position and everything before it, as in a real cache. A token computed after an eviction is
marked with its request, because no other request may ever read it. That holds in layers with a sliding window or a
state as well, which are groups of their own, share the pool and are not compacted (`beside`).
"""

from __future__ import annotations

import random

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash, get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from skipkv_vllm.config import KVPolicyConfig, ResolvedRequest
from skipkv_vllm.core.limits import Limits, OtherGroups, ceil_div, state_group, window_group
from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Strength
from skipkv_vllm.integration.block_manager import EvictingBlockManager
from skipkv_vllm.integration.free_queue import GuardQueue
from skipkv_vllm.scheduler.admission import Ledger
from skipkv_vllm.scheduler.planner import PlannedCompaction
from skipkv_vllm.scheduler.requests import RequestRecord
from tests.unit.integration import beside
from tests.unit.integration.tokens import LONGEST, MAX_MODEL_LEN, PAGE, Order, Token, Tracked


class Engine:
    """The parts of scheduler and worker that touch blocks."""

    def __init__(
        self,
        num_pages: int,
        seed: int,
        enable_caching: bool = True,
        is_bounded: bool = False,
        is_guarded: bool = False,
        windows: tuple[int, ...] = (),
        num_states: int = 0,
    ) -> None:
        init_none_hash(sha256)
        self.random = random.Random(seed)
        shape = {"block_size": PAGE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        # The group that is compacted is not the first one.
        specs = [
            *(SlidingWindowSpec(**shape, sliding_window=window) for window in windows),
            *[beside.state_spec(enable_caching)] * num_states,
            FullAttentionSpec(**shape),
        ]
        groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
        self.kv = KVCacheManager(
            KVCacheConfig(num_pages, [], groups),
            MAX_MODEL_LEN,
            scheduler_block_size=max(spec.block_size for spec in specs),
            hash_block_size=PAGE,
            enable_caching=enable_caching,
        )
        *self.beside, _ = managers = self.kv.coordinator.single_type_managers
        states = [state_group(PAGE if enable_caching else MAX_MODEL_LEN, has_prefix_cache=enable_caching)] * num_states
        self.others = OtherGroups((*(window_group(window, PAGE) for window in windows), *states), MAX_MODEL_LEN)
        self.is_aligned = bool(states) and enable_caching
        self.requests: dict[str, RequestRecord] = {}
        # One block is vLLM's placeholder.
        ledger = Ledger(num_pages - 1, PAGE, is_bounded)
        self.manager = EvictingBlockManager.adopt(managers, len(self.beside), self.requests, ledger)
        self.pool = self.kv.block_pool
        if is_guarded:
            self.pool.free_block_queue = GuardQueue.adopt(self.pool.free_block_queue, seed)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        self.tracked: dict[str, Tracked] = {}
        self.running: list[str] = []
        self.waiting: list[str] = []
        self.pages: dict[int, list[Token | None]] = {i: [None] * PAGE for i in range(num_pages)}
        self.published: dict[bytes, tuple[Token, ...]] = {}
        names = "compactions replaced refused preemptions short hits finished lookahead settled no_lookahead"
        self.counts = dict.fromkeys(names.split(), 0)
        self._next_id = 0

    # ---- traffic

    def arrive(self, prompt: list[int], limits: Limits | None) -> None:
        request_id = f"r{self._next_id}"
        self._next_id += 1
        request = Request(request_id, list(prompt), SamplingParams(max_tokens=200), None, block_hasher=self.hasher)
        self.tracked[request_id] = Tracked(request, limits)
        policy = KVPolicyConfig(kv_policy="rkv").policy
        resolved = ResolvedRequest(policy, Need.NOTHING, limits, len(prompt), 0, None, Strength(0, 0, 0))
        self.requests[request_id] = RequestRecord.make(
            request_id,
            resolved,
            resolved.demand(LONGEST + 1, PAGE, self.others),
            end=LONGEST,
            num_queries=8,
            block_size=PAGE,
        )
        self.waiting.append(request_id)

    def leave(self, request_id: str) -> None:
        """Finish or abort a request."""
        self.kv.free(self.tracked[request_id].request)
        del self.tracked[request_id], self.requests[request_id]
        for queue in (self.running, self.waiting):
            if request_id in queue:
                queue.remove(request_id)
        self.counts["finished"] += 1

    def preempt(self, request_id: str) -> None:
        tracked = self.tracked[request_id]
        self.running.remove(request_id)
        self.kv.free(tracked.request)
        self.requests[request_id].planner.restart()
        tracked.request.num_computed_tokens = 0
        tracked.request.status = RequestStatus.PREEMPTED
        tracked.held, tracked.num_evicted, tracked.written = set(), 0, {}
        tracked.life += 1
        self.waiting.insert(0, request_id)
        self.counts["preemptions"] += 1

    # ---- one engine step

    def step(self, chunk: int) -> None:
        self.kv.new_step_starts()
        preempted: set[str] = set()
        orders = self._compact(preempted)
        scheduled = self._schedule_running(chunk, preempted)
        if not preempted:
            scheduled |= self._schedule_waiting(chunk)
        for order in orders:
            if order.request_id not in preempted:
                self._carry_out(order)
        for request_id, count in scheduled.items():
            self._write(request_id, count)
        for request_id, count in scheduled.items():
            tracked = self.tracked[request_id]
            request = tracked.request
            request.num_computed_tokens += count
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(self.random.randrange(50))

    def _compact(self, preempted: set[str]) -> list[Order]:
        orders, due, lookahead = [], [], []
        for request_id in self.running:
            record = self.requests[request_id]
            num_logical = self.tracked[request_id].request.num_computed_tokens
            if (plan := record.planner.due(num_logical, record.num_evicted)) is not None:
                due.append((request_id, plan))
        for _, plan in due:
            if plan.num_lookahead:
                held = {
                    block.block_id
                    for manager in (self.manager, *self.beside)
                    for blocks in manager.req_to_blocks.values()
                    for block in blocks
                }
                found = self.manager.take_lookahead(plan.num_lookahead)
                self.counts["lookahead" if found else "no_lookahead"] += 1
                assert found is None or len(set(found)) == ceil_div(plan.num_lookahead, PAGE)
                lookahead += found or []
                assert len(set(lookahead) | held) == len(lookahead) + len(held), "a lookahead block is also held"
        for request_id, plan in due:
            tracked = self.tracked[request_id]
            assert tracked.limits is not None
            while request_id in self.running and self._lacks_pages(request_id, plan):
                preempted.add(self._make_room())
            if request_id not in self.running:
                continue
            blocks_before = [block.block_id for block in self.manager.req_to_blocks[request_id]]
            assert plan.num_resident == tracked.request.num_computed_tokens - tracked.num_evicted
            shared = {b.block_id for b in self.manager.req_to_blocks[request_id] if b.ref_cnt > 1}
            pages = self.manager.compact(request_id, plan)
            assert pages is not None
            assert pages.source_blocks == blocks_before
            assert len(pages.target_blocks) == ceil_div(plan.num_keep, PAGE)
            intact = plan.protected // PAGE
            for i, target in enumerate(pages.target_blocks):
                source = pages.source_blocks[i]
                assert (target != source) == (i >= intact and source in shared)
                self.counts["replaced"] += target != source
            assert not set(pages.target_blocks[intact:]) & shared, "a shared block would be written"
            orders.append(
                Order(
                    request_id,
                    plan.num_resident,
                    plan.num_keep,
                    plan.protected,
                    tracked.limits.window,
                    tracked.request.num_computed_tokens,
                    pages.source_blocks,
                    pages.target_blocks,
                )
            )
            self.requests[request_id].planner.committed(tracked.request.num_computed_tokens)
            tracked.num_evicted += plan.num_resident - plan.num_keep
            assert self.manager.num_evicted(request_id) == tracked.num_evicted
            assert tracked.request.num_computed_tokens - tracked.num_evicted == tracked.limits.keep
            self.counts["compactions"] += 1
        assert not {page for order in orders for page in order.target_blocks} & set(lookahead)
        if lookahead:
            self.manager.return_lookahead()
        # The workers write there first in the step; a request that gets the blocks in the same step writes them again.
        for page in lookahead:
            self.pages[page] = [None] * PAGE
        return orders

    def _lacks_pages(self, request_id: str, plan: PlannedCompaction) -> bool:
        """Return whether a compaction is refused. Others are not carried out here."""
        blocks = self.manager.req_to_blocks[request_id][: ceil_div(plan.num_keep, PAGE)]
        shared = [block for block in blocks[plan.protected // PAGE :] if block.ref_cnt > 1]
        if len(shared) <= self.pool.get_num_free_blocks():
            return False
        before = self._bookkeeping()
        assert self.manager.compact(request_id, plan) is None
        assert self._bookkeeping() == before, "a refused compaction changed something"
        self.counts["refused"] += 1
        return True

    def _make_room(self) -> str:
        """Preempt the newest request, because a block is missing."""
        victim = self.running[-1]
        self.counts["short"] += 1
        self.preempt(victim)
        return victim

    def _schedule_running(self, chunk: int, preempted: set[str]) -> dict[str, int]:
        scheduled: dict[str, int] = {}
        index = 0
        while index < len(self.running):
            request_id = self.running[index]
            request = self.tracked[request_id].request
            record = self.requests[request_id]
            count = self._count(request_id, request.num_computed_tokens, chunk)
            if not count:
                index += 1
                continue
            if record.promise.num_in_flight and request.num_computed_tokens + 1 >= request.num_tokens:
                self.manager.settle(record)
                self.counts["settled"] += not record.promise.num_in_flight
            while True:
                if self.kv.allocate_slots(request, count) is not None:
                    scheduled[request_id] = count
                    index += 1
                    break
                victim = self._make_room()
                preempted.add(victim)
                scheduled.pop(victim, None)
                if victim == request_id:
                    break
        return scheduled

    def _count(self, request_id: str, start: int, chunk: int) -> int:
        """Return how many tokens of a request the step computes."""
        request, record = self.tracked[request_id].request, self.requests[request_id]
        count = min(chunk, request.num_tokens - start)
        if self.is_aligned:
            count = beside.aligned(request, start, count, chunk)
        return min(count, record.planner.room(start, record.num_evicted))

    def _schedule_waiting(self, chunk: int) -> dict[str, int]:
        scheduled: dict[str, int] = {}
        while self.waiting:
            request_id = self.waiting[0]
            tracked = self.tracked[request_id]
            request = tracked.request
            blocks, num_hit, _ = self.kv.get_computed_blocks(request)
            if tracked.limits is not None and num_hit > tracked.limits.cacheable:
                most = tracked.limits.cacheable // PAGE * PAGE
                found, num_hit, _ = self.kv.coordinator.find_longest_cache_hit(request.block_hashes, most)
                blocks = self.kv.create_kv_cache_blocks(found)
            count = self._count(request_id, num_hit, chunk)
            if not count:
                break
            new = self.kv.allocate_slots(
                request, count, num_new_computed_tokens=num_hit, new_computed_blocks=blocks, full_sequence_must_fit=True
            )
            if new is None:
                break
            self.waiting.pop(0)
            self.running.append(request_id)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit
            # A hit means these tokens; the content of the blocks is checked after the step.
            tracked.held = {tracked.pure(p) for p in range(num_hit)}
            tracked.written = {p: tracked.pure(p) for p in range(num_hit)}
            self.counts["hits"] += num_hit > 0
            scheduled[request_id] = count
        return scheduled

    # ---- the worker

    def _carry_out(self, order: Order) -> None:
        """Copy replaced blocks, then move arbitrary survivors into the holes."""
        for old, new in zip(order.source_blocks, order.target_blocks, strict=False):
            if old != new:
                self.pages[new] = list(self.pages[old])
        tokens = [self.pages[order.source_blocks[s // PAGE]][s % PAGE] for s in range(order.num_resident)]
        tracked = self.tracked[order.request_id]
        assert set(tokens) == tracked.held, "the blocks to compact do not hold the request's tokens"

        def pinned(token: Token) -> bool:
            return token.position < order.protected or token.position >= order.num_logical - order.window

        free = [s for s, token in enumerate(tokens) if not pinned(token)]
        chosen = self.random.sample(free, order.num_keep - (len(tokens) - len(free)))
        kept = [s for s, token in enumerate(tokens) if pinned(token)] + chosen
        movers = [s for s in kept if s >= order.num_keep]
        holes = sorted(set(range(order.num_keep)) - set(kept))
        self.random.shuffle(holes)
        for mover, hole in zip(movers, holes, strict=True):
            page = order.target_blocks[hole // PAGE]
            self.assert_writable(order.request_id, page)
            assert self.pool.blocks[page].block_hash is None, "a cached block is overwritten"
            self.pages[page][hole % PAGE] = tokens[mover]
        tracked.held = {tokens[s] for s in kept}

    def _write(self, request_id: str, count: int) -> None:
        tracked = self.tracked[request_id]
        request = tracked.request
        blocks = self.manager.req_to_blocks[request_id]
        for position in range(request.num_computed_tokens, request.num_computed_tokens + count):
            token = tracked.pure(position)
            if tracked.num_evicted:
                token = token._replace(private=f"{request_id}.{tracked.life}")
            slot = position - tracked.num_evicted
            page = blocks[slot // PAGE].block_id
            self.assert_writable(request_id, page)
            self.pages[page][slot % PAGE] = token
            tracked.held.add(token)
            tracked.written[position] = token
        for manager in self.beside:
            beside.write(self, request_id, manager, request.num_computed_tokens, count)

    def assert_writable(self, request_id: str, page: int, manager: SingleTypeKVCacheManager | None = None) -> None:
        tables = (manager or self.manager).req_to_blocks
        block = self.pool.blocks[page]
        assert not block.is_null
        assert block in tables[request_id]
        holders = [r for r, blocks in tables.items() if block in blocks]
        if block.block_hash is None:
            assert block.ref_cnt == 1, f"block {page} is written while {holders} hold it"
        # vLLM caches a block in the step that fills it, and another request of the same step may hit it; its
        # content is then checked against its hash after the step.

    # ---- the checks

    def _bookkeeping(self) -> tuple:
        return (
            [(b.block_id, b.ref_cnt, b.block_hash) for b in self.pool.blocks],
            {r: [b.block_id for b in blocks] for r, blocks in self.manager.req_to_blocks.items()},
            {name: (record.promise, record.num_evicted, record.num_intact) for name, record in self.requests.items()},
            dict(self.manager.num_cached_block),
            [b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()],
        )

    def check(self) -> None:
        self.manager.check_integrity()
        assert set(self.manager.req_to_blocks) == set(self.running)
        for request_id in self.running:
            tracked = self.tracked[request_id]
            request = tracked.request
            resident = request.num_computed_tokens - tracked.num_evicted
            blocks = self.manager.req_to_blocks[request_id]
            assert self.manager.num_blocks(request_id) == len(blocks) == ceil_div(resident, PAGE)
            content = [self.pages[blocks[s // PAGE].block_id][s % PAGE] for s in range(resident)]
            assert len(tracked.held) == resident
            assert set(content) == tracked.held, f"{request_id}'s blocks do not hold its tokens"
            for manager in self.beside:
                beside.check(self, request_id, manager)
            if tracked.limits is not None and tracked.num_evicted:
                protected = {tracked.pure(p) for p in range(tracked.limits.protected)}
                assert protected <= tracked.held
        self._check_bounds()
        self._check_published()

    def _check_bounds(self) -> None:
        for request_id in self.running:
            tracked = self.tracked[request_id]
            if tracked.limits is not None:
                resident = tracked.request.num_computed_tokens - tracked.num_evicted
                assert resident <= tracked.limits.bound
                assert self.manager.num_blocks(request_id) <= ceil_div(tracked.limits.bound, PAGE)

    def _check_published(self) -> None:
        """Check that every block in the prefix cache holds the tokens of its hash."""
        for tracked in self.tracked.values():
            for i, block_hash in enumerate(tracked.request.block_hashes):
                self.published[block_hash] = tuple(tracked.pure(p) for p in range(i * PAGE, (i + 1) * PAGE))
        for block in self.pool.blocks:
            if block.block_hash is not None:
                expected = self.published[get_block_hash(block.block_hash)]
                assert tuple(self.pages[block.block_id]) == expected, f"block {block.block_id} does not match its hash"
