"""Property test of the page bookkeeping: random traffic against a model of what every page holds.

vLLM's real `KVCacheManager` with the evicting block manager is driven the way vLLM's scheduler drives it:
compactions first, then running requests (preempting the last one when the pool is full), then waiting
ones with prefix-cache look-up. A faithful worker writes and moves tokens in a dictionary of pages.

A token's content is its position and everything before it, as in a real cache; a token computed after an
eviction is marked by its request, because no other request may ever read it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from skipkv_vllm.config import KVPolicyConfig, ResolvedRequest
from skipkv_vllm.core.limits import Limits, ceil_div
from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Strength
from skipkv_vllm.integration.block_manager import EvictingBlockManager
from skipkv_vllm.integration.free_queue import GuardQueue
from skipkv_vllm.scheduler.planner import PlannedCompaction
from skipkv_vllm.scheduler.requests import RequestRecord

PAGE = 4
MAX_MODEL_LEN = 400
LONGEST = 60
"""tokens at which a request ends"""


class Token(NamedTuple):
    """Content of one slot: what the KV of a token depends on."""

    position: int
    prefix: int
    """hash of all token ids up to and including this one"""
    private: str | None
    """request and life that computed it from an already evicted cache"""


class Order(NamedTuple):
    request_id: str
    num_resident: int
    num_keep: int
    protected: int
    window: int
    num_logical: int
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass
class Tracked:
    """A request as the model knows it."""

    request: Request
    limits: Limits | None
    held: set[Token] = field(default_factory=set)
    chain: list[int] = field(default_factory=list)
    life: int = 0
    num_evicted: int = 0

    def prefix(self, position: int) -> int:
        """Hash of the token ids up to `position`."""
        tokens = self.request.all_token_ids
        while len(self.chain) <= position:
            before = self.chain[-1] if self.chain else 0
            self.chain.append(hash((before, tokens[len(self.chain)])))
        return self.chain[position]

    def pure(self, position: int) -> Token:
        return Token(position, self.prefix(position), None)


class Engine:
    """The scheduler's and the worker's part that touches pages."""

    def __init__(
        self, num_pages: int, seed: int, enable_caching: bool = True, is_bounded: bool = False, is_guarded: bool = False
    ) -> None:
        init_none_hash(sha256)
        self.random = random.Random(seed)
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(num_pages, [], [KVCacheGroupSpec(["layer"], spec)])
        self.kv = KVCacheManager(
            config, MAX_MODEL_LEN, scheduler_block_size=PAGE, hash_block_size=PAGE, enable_caching=enable_caching
        )
        (stock,) = self.kv.coordinator.single_type_managers
        self.requests: dict[str, RequestRecord] = {}
        self.manager = EvictingBlockManager.adopt(stock, self.requests, is_bounded=is_bounded)
        self.pool = self.kv.block_pool
        if is_guarded:
            self.pool.free_block_queue = GuardQueue.adopt(self.pool.free_block_queue, seed)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        self.tracked: dict[str, Tracked] = {}
        self.running: list[str] = []
        self.waiting: list[str] = []
        self.pages: dict[int, list[Token | None]] = {i: [None] * PAGE for i in range(num_pages)}
        self.published: dict[bytes, tuple[Token, ...]] = {}
        names = ("compactions", "replaced", "refused", "preemptions", "short", "hits", "finished", "lookahead")
        self.counts = dict.fromkeys((*names, "no_lookahead"), 0)
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
            request_id, resolved, resolved.demand(LONGEST + 1, PAGE), num_queries=8, block_size=PAGE
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
        tracked.held, tracked.num_evicted = set(), 0
        tracked.life += 1
        self.waiting.insert(0, request_id)
        self.counts["preemptions"] += 1

    # ---- one engine step

    def step(self, chunk: int) -> None:
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
                held = {block.block_id for blocks in self.manager.req_to_blocks.values() for block in blocks}
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
            assert not set(pages.target_blocks[intact:]) & shared, "a shared page would be written"
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
        # The workers write there before anything else of the step; who gets the pages in it writes them anew.
        for page in lookahead:
            self.pages[page] = [None] * PAGE
        return orders

    def _lacks_pages(self, request_id: str, plan: PlannedCompaction) -> bool:
        """Whether a compaction is refused. One that is not refused is not carried out here."""
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
        """For want of a page, the newest request is preempted."""
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
            room = record.planner.room(request.num_computed_tokens, record.num_evicted)
            count = min(chunk, room, request.num_tokens - request.num_computed_tokens)
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

    def _schedule_waiting(self, chunk: int) -> dict[str, int]:
        scheduled: dict[str, int] = {}
        while self.waiting:
            request_id = self.waiting[0]
            tracked = self.tracked[request_id]
            request = tracked.request
            blocks, num_hit, _ = self.kv.get_computed_blocks(request)
            if tracked.limits is not None and num_hit > tracked.limits.cacheable:
                num_hit = tracked.limits.cacheable // PAGE * PAGE
                blocks = self.kv.truncate_computed_blocks(blocks, num_hit)
            count = min(chunk, self.requests[request_id].planner.room(num_hit, 0), request.num_tokens - num_hit)
            new = self.kv.allocate_slots(
                request, count, num_new_computed_tokens=num_hit, new_computed_blocks=blocks, full_sequence_must_fit=True
            )
            if new is None:
                break
            self.waiting.pop(0)
            self.running.append(request_id)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit
            # A hit means these tokens; whether the pages hold them is checked after the step.
            tracked.held = {tracked.pure(p) for p in range(num_hit)}
            self.counts["hits"] += num_hit > 0
            scheduled[request_id] = count
        return scheduled

    # ---- the worker

    def _carry_out(self, order: Order) -> None:
        """Copy replaced pages, then move arbitrary survivors into the holes."""
        for old, new in zip(order.source_blocks, order.target_blocks, strict=False):
            if old != new:
                self.pages[new] = list(self.pages[old])
        tokens = [self.pages[order.source_blocks[s // PAGE]][s % PAGE] for s in range(order.num_resident)]
        tracked = self.tracked[order.request_id]
        assert set(tokens) == tracked.held, "the pages to compact do not hold the request's tokens"

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
            self._assert_writable(order.request_id, page)
            assert self.pool.blocks[page].block_hash is None, "a published page is overwritten"
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
            self._assert_writable(request_id, page)
            self.pages[page][slot % PAGE] = token
            tracked.held.add(token)

    def _assert_writable(self, request_id: str, page: int) -> None:
        block = self.pool.blocks[page]
        assert not block.is_null
        assert block in self.manager.req_to_blocks[request_id]
        holders = [r for r, blocks in self.manager.req_to_blocks.items() if block in blocks]
        if block.block_hash is None:
            assert block.ref_cnt == 1, f"page {page} is written while {holders} hold it"
        # vLLM publishes a page in the step that fills it, and another request of the same step may hit it; its
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
            assert set(content) == tracked.held, f"{request_id}'s pages do not hold its tokens"
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
        """Every page in the prefix cache holds the tokens its hash stands for."""
        for tracked in self.tracked.values():
            for i, block_hash in enumerate(tracked.request.block_hashes):
                self.published[block_hash] = tuple(tracked.pure(p) for p in range(i * PAGE, (i + 1) * PAGE))
        for block in self.pool.blocks:
            if block.block_hash is not None:
                expected = self.published[get_block_hash(block.block_hash)]
                assert tuple(self.pages[block.block_id]) == expected, f"page {block.block_id} is not its hash"


# ---- operations

PREFIXES = [[7] * 4, list(range(8)), list(range(14)), [*range(8), *range(30, 40)]]

arrivals = st.tuples(
    st.just("arrive"),
    st.integers(0, len(PREFIXES) - 1),
    st.integers(0, 6),  # tokens after the prefix
    st.integers(0, 1),  # which ones
    st.one_of(
        st.none(),
        st.tuples(st.integers(5, 16), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.sampled_from([0, 0, 3])),
    ),
)
steps = st.tuples(st.just("step"), st.integers(1, 6), st.sampled_from([1, 3, 64]))
others = st.tuples(st.sampled_from(["finish", "preempt"]), st.integers(0, 7))


def apply(engine: Engine, operation: tuple) -> None:
    match operation:
        case ("arrive", prefix, tail, flavour, drawn):
            prompt = [*PREFIXES[prefix], *(100 + flavour for _ in range(tail))]
            limits = None
            if drawn is not None:
                budget, buffer, window, protects, num_draft = drawn
                limits = Limits(budget, buffer, window, len(prompt) if protects else 0)
                if num_draft and not protects:
                    limits = Limits(budget, buffer, window, 0, prompt_end=len(prompt), num_draft=num_draft)
            engine.arrive(prompt, limits)
        case ("step", times, chunk):
            for _ in range(times):
                engine.step(chunk)
                engine.check()
                # vLLM ends a request that would outgrow the pool; here the longest lines do.
                for request_id in [r for r in engine.running if engine.tracked[r].request.num_tokens > LONGEST]:
                    engine.leave(request_id)
        case ("finish", which):
            everyone = engine.running + engine.waiting
            if everyone:
                engine.leave(everyone[which % len(everyone)])
        case ("preempt", which):
            if engine.running:
                engine.preempt(engine.running[which % len(engine.running)])


def finish_all(engine: Engine) -> None:
    for request_id in list(engine.tracked):
        engine.leave(request_id)
    engine.check()
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1, "pages were lost"
    assert not engine.manager.req_to_blocks
    assert not engine.requests
    assert not engine.manager.num_cached_block
    assert engine.manager.ledger.num_promised == 0
    assert not engine.manager.ledger._num_holders


TOTALS: dict[str, int] = {}


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    # The longest request always fits the pool alone.
    num_pages=st.sampled_from([18, 24, 40]),
    seed=st.integers(0, 2**16),
    caching=st.sampled_from([True, True, True, False]),
    bounded=st.booleans(),
    guarded=st.booleans(),
    operations=st.lists(st.one_of(arrivals, arrivals, steps, steps, steps, others), min_size=20, max_size=50),
)
def run_traffic(num_pages, seed, caching, bounded, guarded, operations):
    engine = Engine(num_pages, seed, caching, bounded, guarded)
    for operation in operations:
        apply(engine, operation)
        engine.check()
    if bounded:
        for count in ("short", "refused", "no_lookahead"):
            assert engine.counts[count] == 0, "a request did not find a page it was promised"
    finish_all(engine)
    for name, count in engine.counts.items():
        TOTALS[name] = TOTALS.get(name, 0) + count
        if count:
            event(name)


def test_random_traffic_keeps_every_page_right():
    TOTALS.clear()
    run_traffic()
    # The examples must have reached everything they are meant to test.
    missing = [name for name, count in TOTALS.items() if count == 0 and name not in ("refused", "no_lookahead")]
    assert not missing, TOTALS


# ---- single cases that the random traffic reaches rarely, spelt out


def drive(engine: Engine, steps: int, chunk: int = 64) -> None:
    for _ in range(steps):
        engine.step(chunk)
        engine.check()


def test_two_requests_share_a_prompt_and_both_evict_it():
    engine = Engine(num_pages=40, seed=0)
    prompt = list(range(12))
    for _ in range(2):
        engine.arrive([*prompt, 99], Limits(budget=13, buffer=3, window=2, protected=0))
        drive(engine, 1)
    assert engine.counts["hits"] == 1
    drive(engine, 12)
    assert engine.counts["replaced"] >= 1
    assert engine.counts["compactions"] >= 4
    finish_all(engine)


def test_a_protected_shared_prompt_is_never_replaced():
    engine = Engine(num_pages=40, seed=0)
    for _ in range(3):
        engine.arrive(list(range(12)), Limits(budget=8, buffer=3, window=2, protected=12))
        drive(engine, 1)
    shared = [b.block_id for b in engine.manager.req_to_blocks["r0"][:2]]
    drive(engine, 20)
    assert engine.counts["compactions"] >= 3
    assert engine.counts["replaced"] == 0
    for request_id in ("r0", "r1", "r2"):
        assert [b.block_id for b in engine.manager.req_to_blocks[request_id][:2]] == shared
    finish_all(engine)


def test_a_compaction_that_finds_no_free_page_changes_nothing_and_somebody_is_preempted():
    # 5 usable pages: r0 and r1 share two prompt pages, and one page is free when r1 must replace both.
    engine = Engine(num_pages=6, seed=0)
    prompt = list(range(8))
    engine.arrive([*prompt, 50], None)
    drive(engine, 1)
    engine.arrive([*prompt, 60, 61, 62], Limits(budget=8, buffer=4, window=2, protected=0))
    drive(engine, 2)
    assert engine.pool.get_num_free_blocks() == 1
    engine.step(1)
    engine.check()
    assert engine.counts["refused"] == engine.counts["preemptions"] == 1
    assert engine.counts["compactions"] == 0
    assert engine.running == ["r0"]
    finish_all(engine)


def test_a_compacted_request_publishes_nothing_more():
    engine = Engine(num_pages=40, seed=0)
    engine.arrive(list(range(8)), Limits(budget=12, buffer=4, window=2, protected=8))
    drive(engine, 40)
    assert engine.counts["compactions"] >= 3
    hashed = [b for b in engine.manager.req_to_blocks["r0"] if b.block_hash is not None]
    assert len(hashed) == 2, "the intact prompt pages and no others"
    # The same text again hits exactly the prompt, and pages freed by the first compaction while still right.
    engine.arrive(list(engine.tracked["r0"].request.all_token_ids), None)
    drive(engine, 2)
    finish_all(engine)


def test_a_preempted_request_starts_over_from_nothing():
    engine = Engine(num_pages=40, seed=0)
    engine.arrive(list(range(8)), Limits(budget=10, buffer=4, window=2, protected=8))
    drive(engine, 12)
    assert engine.manager.num_evicted("r0") > 0
    engine.preempt("r0")
    engine.check()
    assert engine.manager.num_evicted("r0") == 0
    assert engine.pool.get_num_free_blocks() == 39
    drive(engine, 12, chunk=3)
    assert engine.manager.num_evicted("r0") > 0
    finish_all(engine)


@pytest.mark.parametrize("corrupt", ["lost", "twice", "leaked", "stale", "published"])
def test_check_integrity_can_fail(corrupt):
    engine = Engine(num_pages=20, seed=0)
    engine.arrive(list(range(9)), Limits(budget=8, buffer=4, window=2, protected=0))
    drive(engine, 5)
    blocks = engine.manager.req_to_blocks["r0"]
    if corrupt == "lost":
        blocks.pop()
    elif corrupt == "twice":
        blocks.append(blocks[0])
    elif corrupt == "leaked":
        engine.pool.free_block_queue.popleft()
    elif corrupt == "stale":
        engine.arrive(list(range(9)), None)
        engine.requests["r1"].promise = engine.requests["r0"].promise
    else:
        # A page behind a rewritten one cannot be a prefix any more.
        assert blocks[0].block_hash is None
        assert engine.manager.num_evicted("r0")
        block_hash = engine.tracked["r0"].request.block_hashes[1]
        engine.pool._insert_block_hash(make_block_hash_with_group_id(block_hash, 0), blocks[1], num_tokens=2 * PAGE)
    with pytest.raises(AssertionError):
        engine.manager.check_integrity()


def test_adopting_a_used_or_foreign_manager_is_refused():
    engine = Engine(num_pages=20, seed=0)
    with pytest.raises(AssertionError):
        EvictingBlockManager.adopt(engine.manager, {})
