"""A worker without vLLM, and a dense reference that keeps every request's tokens in plain lists.

`Simulation` plays the scheduler and the model runner around an `EvictionRuntime`: it allocates pages,
computes random K, V, queries and hidden states, writes them where the runtime says, and orders compactions.
Beside that it does every compaction a second time, with loops over lists, from the method's formulas.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits, ceil_div
from skipkv_vllm.core.needs import ACCUMULATED, FROM_RECENT_QUERIES, Need
from skipkv_vllm.core.orders import Accumulation, Compaction, Started, StepOrders
from skipkv_vllm.ops.paging import Layout, PagedCache, cpu_layout, layer_pages
from skipkv_vllm.policies.gates import Gate, Gates
from skipkv_vllm.scheduler.planner import AccumulationSchedule, EvictionPlanner
from skipkv_vllm.sentences import SentenceTables, split_sentences
from skipkv_vllm.sentences.recurrence import GRAM
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.ranks import ALONE
from skipkv_vllm.worker.requests import Rows
from skipkv_vllm.worker.runtime import EvictionRuntime
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.attention_mass import AttentionMass
from skipkv_vllm.worker.signals.base import ForwardOutput
from skipkv_vllm.worker.signals.gates import TokenGates
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.segments import SegmentSparsity
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from skipkv_vllm.worker.signals.sentences import Sentences
from tests.reference import formulas

LAYERS, KV_HEADS, Q_HEADS, DIM, HIDDEN = 2, 2, 4, 8, 6
DOT, WORDS = 9, (1, 2, 3, 4, 5)
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
CPU = torch.device("cpu")


def importance_of(queries: Tensor, keys: Tensor, window: int, pool: int) -> list[float]:
    """Eq. 4 for one kv head in double precision: queries `[W, group, D]`, keys `[L, D]`."""
    old = keys.shape[0] - window
    logits = (queries.double() @ keys[:old].double().T / keys.shape[1] ** 0.5).amax(1)
    mean = logits.softmax(-1).mean(0).tolist()
    return [max(mean[max(0, i - pool // 2) : i + pool // 2 + 1]) for i in range(old)]


def redundancy_of(keys: Tensor, threshold: float) -> list[float]:
    """Eq. 5 for one kv head in double precision: keys `[L, D]`."""
    unit = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for row in cosine:
        similar = [j for j, value in enumerate(row.tolist()) if value > threshold]
        row[similar[-1] if similar else 0] = 0
    return cosine.mean(0).softmax(-1).tolist()


def error_of(query: Tensor, keys: list[Tensor], values: Tensor) -> list[float]:
    """`A^2 |v - o|^2` of one query `[group, D]`, averaged over the group, in double precision."""
    logits = query.double() @ torch.stack(keys).double().T / query.shape[1] ** 0.5
    weights = logits.softmax(-1)
    distance = (values.double() - (weights @ values.double())[:, None]).square().sum(-1)
    return (weights**2 * distance).mean(0).tolist()


def attention_of(query: Tensor, keys: list[Tensor]) -> list[float]:
    """Attention of one query `[group, D]` to keys `[D]` each, averaged over the group, in double precision."""
    logits = query.double() @ torch.stack(keys).double().T / query.shape[1] ** 0.5
    return logits.softmax(-1).mean(0).tolist()


def hashed(seed: int, layer: int, head: int, position: int, length: int) -> float:
    """The number that decides a token's fate under `random`, in plain integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    state = mix(length)
    for value in (seed, layer, head, position):
        state = mix((state + value) % 2**32)
    return state / 2**32


@functools.cache
def gates() -> Gates:
    """Random gates for what the simulation calls a model; most tokens last about ten steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, HIDDEN), (5,), (KV_HEADS, 5), (KV_HEADS,))
    layers = [Gate(*(torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(LAYERS)]
    return Gates([gate._replace(bias2=gate.bias2 + 2) for gate in layers])


@functools.cache
def gates_file() -> str:
    """The same as a file."""
    folder = tempfile.mkdtemp(prefix="skipkv-gates-")
    atexit.register(shutil.rmtree, folder)
    gates().save(f"{folder}/gates.safetensors", {})
    return f"{folder}/gates.safetensors"


class Cell(NamedTuple):
    """One token in one layer and head."""

    position: int
    key: Tensor
    value: Tensor
    log_beta: float


class FakeAttention:
    def forward(self, layer: object, query: Tensor) -> Tensor:
        return query


class FakeBlock(torch.nn.Module):
    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states


@dataclass
class FakeDecoder:
    """Stands in for the model that decodes ahead: checks what it is given, and returns queries drawn before."""

    sim: Simulation
    max_length: int
    max_tokens: int = 5

    def decode(
        self, tokens: Tensor, starts: list[int], num_held: list[int], table: Tensor, page_size: int, num_tokens: int = 0
    ) -> Tensor:
        found = []
        assert tokens.numel() <= self.max_tokens
        for r, start in enumerate(starts):
            (request,) = (each for each in self.sim.running.values() if each.num_logical == start)
            num_read = request.lookahead_queries.shape[1]
            if num_tokens:
                assert start == request.num_prompt
                assert tokens[r] == request.logits.argmax()
                assert num_read == num_tokens
            else:
                assert start < request.num_prompt
                assert tokens[r].tolist() == request.question[-num_read:]
                self._append(request, table[r], page_size, num_held[r])
            assert table[r].unique().numel() * page_size >= num_held[r] + num_read
            for layer, pages in enumerate(self.sim.layers):
                held = pages.keys.read_pages(table[r, : ceil_div(num_held[r], page_size)].long(), num_held[r])
                assert [sorted(head) for head in held.tolist()] == request.copy[layer]
            found.append(request.lookahead_queries)
        return torch.stack(found)

    def _append(self, request: Running, table: Tensor, page_size: int, num_held: int) -> None:
        """Write the question's keys behind the held tokens."""
        for i in range(request.asked.shape[1]):
            page, offset = table[(num_held + i) // page_size].long(), torch.tensor((num_held + i) % page_size)
            for layer, pages in enumerate(self.sim.layers):
                key = request.asked[layer, i]
                content = [torch.cat([key, key], -1)] if len(pages.cells) == 1 else [key, key]
                for cell, vectors in zip(pages.cells, content, strict=True):
                    cell.scatter(page, torch.arange(KV_HEADS), offset, vectors)

    def question(self, request_id: str, num_tokens: int) -> list[int]:
        return self.sim.running[request_id].question[-num_tokens:]


@dataclass
class Running:
    """A request as the simulation knows it."""

    name: str
    num_prompt: int
    budget: int
    protected: int
    managed: bool
    planner: EvictionPlanner = field(default_factory=lambda: EvictionPlanner(None))
    num_logical: int = 0
    num_evicted: int = 0
    num_compactions: int = 0
    first_tracked: int = 0
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    """`[layers, Hq, D]` by position; None for a token taken from the prefix cache"""
    dense: list[list[list[Cell]]] = field(
        default_factory=lambda: [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    )
    """`[layer][head]`, ascending positions"""
    logits: Tensor | None = None
    lookahead_queries: Tensor | None = None
    """queries of the tokens decoded ahead, `[layers, n, Hq, D]`"""
    copy: list[list[list[list[float]]]] = field(default_factory=list)
    """keys of the cache behind which they were computed, by layer and head, sorted"""
    question: list[int] = field(default_factory=lambda: list(range(20, 30)))
    asked: Tensor | None = None
    """keys of the question, `[layers, n, H, D]`"""
    again: list[int] = field(default_factory=list)
    """tokens to say again, the next one last"""
    mass: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """attention received so far by (layer, head, position)"""
    errors: dict[tuple[int, int, int], tuple[float, float]] = field(default_factory=dict)
    """of the output without the token, and by how many queries, by (layer, head, position)"""
    sparsities: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """by segment: how sparse its attention was, and how far it shrank for want of room"""
    quota: list[int] = field(default_factory=list)
    shrinks: list[int] = field(default_factory=list)
    """of the latest compaction: tokens of each segment, and segments in the order in which they shrink"""

    @property
    def num_resident(self) -> int:
        return self.num_logical - self.num_evicted


class Simulation:
    """See the module.

    Args:
        policy, granularity, window, protect, parameters: of the server.
        layout: "gpu", "gpu strided" or "vec".
        ratio: kernel pages per block.
        num_rows: requests that can run at once.
    """

    def __init__(
        self,
        policy: str,
        *,
        granularity: str = "head",
        window: int = 4,
        protect: bool = True,
        parameters: dict | None = None,
        layout: str = "gpu",
        ratio: int = 1,
        num_rows: int = 4,
        num_blocks: int = 60,
        page_size: int = 4,
        seed: int = 0,
        buffer: int = 8,
        max_length: int = 400,
        max_tokens: int = 256,
    ) -> None:
        self.config = KVPolicyConfig(
            kv_policy=policy,
            kv_budget=64,
            kv_buffer=buffer,
            kv_window=window,
            kv_granularity=granularity,
            kv_protect_prompt=protect,
            kv_policy_config=parameters or ({"gates": gates_file()} if policy == "trimkv" else {}),
            kv_check_integrity=True,
        )
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.block_size = page_size * ratio
        self.raw = [self._cache(layout, num_blocks * ratio, page_size) for _ in range(LAYERS)]
        needs = self.config.needs
        ring = tracker = token_gates = None
        self.impls = [FakeAttention() for _ in range(LAYERS)]
        if needs & Need.QUERIES:
            ring = QueryRing(
                num_layers=LAYERS,
                num_rows=num_rows,
                window=window,
                num_kept=self.config.num_queries,
                num_heads=Q_HEADS,
                head_size=DIM,
                max_tokens=max_tokens,
                dtype=torch.float32,
                device=CPU,
            )
            for i, impl in enumerate(self.impls):
                ring.attach(i, impl)
        if needs & Need.SENTENCES:
            tracker = SentenceTracker(
                TABLES,
                self.config.policy.sentence_options,
                num_rows=num_rows,
                max_length=max_length,
                hidden_size=HIDDEN if needs & Need.HIDDEN else 0,
                vocab_size=16,
                dtype=torch.float32,
                device=CPU,
                keeps_text=bool(needs & Need.RECURRENCE),
            )
        self.blocks = [FakeBlock() for _ in range(LAYERS)]
        if self.config.gates is not None:
            token_gates = TokenGates(
                self.config.gates.layers,
                first_head=0,
                num_heads=KV_HEADS,
                activation="silu",
                max_tokens=max_tokens,
                dtype=torch.float32,
                device=CPU,
            )
            token_gates.attach(self.blocks)
        signals = Signals(
            ring,
            Sentences(tracker) if tracker is not None else None,
            AttentionMass(ring, buffer) if ring is not None and needs & ACCUMULATED else None,
            SegmentSparsity(ring, window, ALONE) if ring is not None and needs & Need.SEGMENTS else None,
            token_gates,
        )
        self.runtime = EvictionRuntime(self.config, Rows(num_rows), signals, CPU)
        self.decoder = FakeDecoder(self, max_length) if needs & Need.LOOKAHEAD else None
        self._lent: list[int] = []
        packing = Layout.ROWS if layout.startswith("gpu") else cpu_layout(layout)
        self.layers = [layer_pages(raw, packing) for raw in self.raw]
        self.runtime.bind_cache(PagedCache.of(self.raw, packing), self.block_size, decoder=self.decoder)
        self.ratio = ratio
        # Block 0 belongs to nobody, as in vLLM.
        self.free = list(range(1, num_blocks))
        self.references = dict.fromkeys(range(num_blocks), 0)
        self.running: dict[str, Running] = {}
        self._starting: list[Started] = []
        self._finished: list[str] = []
        self._preempted: list[str] = []
        self.topics = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
        self._topic: dict[str, int] = {}
        self.num_replaced = 0
        self.has_spare_pages = True
        """False: no temporary copies"""
        self._steps = 0
        self.last_evicted: np.ndarray | None = None

    @staticmethod
    def _cache(layout: str, pages: int, size: int) -> Tensor:
        if layout == "gpu strided":
            return torch.zeros(pages, size, KV_HEADS, 2 * DIM).transpose(1, 2)
        return torch.zeros(pages, KV_HEADS, size, 2 * DIM)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    # ---- the scheduler

    def start(
        self, name: str, num_prompt: int, budget: int, *, policy: str | None = None, shared_with: str | None = None
    ) -> Running:
        """A request arrives. `policy="none"` leaves it unmanaged; `shared_with` gives it that one's full pages."""
        request = Running(name, num_prompt, budget, 0, policy != "none")
        request.protected = num_prompt if self.config.kv_protect_prompt and request.managed else 0
        if shared_with is not None:
            self._share(request, self.running[shared_with])
        request.first_tracked = request.protected or request.num_logical
        self.running[name] = request
        self._topic[name] = 0
        if request.managed:
            limits = Limits(
                budget,
                self.config.kv_buffer,
                self.config.kv_window,
                request.protected,
                prompt_end=self.prompt_end_of(request),
            )
            schedule = AccumulationSchedule(
                max(request.num_logical, num_prompt - 1), self.config.num_queries, every_query=True
            )
            if self.config.needs & Need.SEGMENTS:
                length = self.config.policy.segment_options.length
                schedule = AccumulationSchedule(request.protected, length, every_query=False)
            request.planner = EvictionPlanner(limits, schedule)
            self._starting.append(
                Started(name, policy or self.config.kv_policy, num_prompt, request.protected, request.first_tracked)
            )
        return request

    def _share(self, request: Running, other: Running) -> None:
        assert not other.num_evicted
        full = min(request.num_prompt - 1, other.num_logical) // self.block_size
        request.num_logical = full * self.block_size
        request.pages = other.pages[:full]
        for page in request.pages:
            self.references[page] += 1
        request.tokens = other.tokens[: request.num_logical]
        request.hidden = other.hidden[: request.num_logical]
        request.queries = [None] * request.num_logical
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                request.dense[layer][head] = other.dense[layer][head][: request.num_logical]

    def stop(self, name: str, *, preempt: bool = False) -> None:
        """A request finishes, or loses its cache."""
        for page in self.running.pop(name).pages:
            self._release(page)
        (self._preempted if preempt else self._finished).append(name)

    def _release(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            self.free.insert(0, page)

    def _allocate(self) -> int:
        page = self.free.pop(self.chance.randrange(min(3, len(self.free))))
        assert self.references[page] == 0
        self.references[page] = 1
        return page

    def keep_of(self, request: Running) -> int:
        return max(request.budget, request.protected + self.config.kv_window)

    def prompt_end_of(self, request: Running) -> int:
        """Length of a prompt that is compacted as soon as it is computed, else 0."""
        return request.num_prompt if self.config.policy.compacts_prompt else 0

    def order(self, request: Running) -> Compaction:
        """Plan a compaction: shared pages that are not wholly protected are replaced."""
        keep = self.keep_of(request)
        target = request.pages[: ceil_div(keep, self.block_size)]
        dropped = request.pages[len(target) :]
        for i in range(request.protected // self.block_size, len(target)):
            if self.references[target[i]] > 1:
                dropped.append(target[i])
                target[i] = self._allocate()
                self.num_replaced += 1
        return Compaction(
            request.name,
            request.num_logical,
            request.num_resident,
            keep,
            list(request.pages),
            target,
            request.num_compactions,
            self._lend(request, keep),
        )

    def _lend(self, request: Running, keep: int) -> list[int]:
        """Pages for a temporary copy, where tokens are decoded ahead; their queries are drawn here."""
        lookahead, request.lookahead_queries, request.asked = self.config.policy.lookahead_plan, None, None
        if lookahead is None or not self.has_spare_pages or request.num_logical > request.num_prompt:
            return []
        is_question = lookahead.draft is None
        if is_question == (request.num_logical == request.num_prompt):
            return []
        num_tokens = self.config.policy.num_question(self.config.kv_window) if is_question else lookahead.num_tokens
        num_pages = ceil_div(num_tokens if is_question else keep + num_tokens, self.block_size)
        num_tokens = min(num_tokens, self.decoder.max_length - request.num_logical)
        request.lookahead_queries = self.random(LAYERS, num_tokens, Q_HEADS, DIM)
        request.copy = []
        if is_question:
            request.asked = self.random(LAYERS, num_tokens, KV_HEADS, DIM)
            request.copy = [[sorted(c.key.tolist() for c in cells) for cells in heads] for heads in request.dense]
        for layer in range(0 if is_question else LAYERS):
            request.copy.append([])
            for head in range(KV_HEADS):
                cells = request.dense[layer][head]
                scores = self._snapkv(request, layer, head, request.num_logical, lookahead.draft.pool)
                ranked = sorted(range(len(cells) - self.config.kv_window), key=lambda i: (-scores[i], i))
                kept = ranked[: keep - self.config.kv_window]
                kept += range(len(cells) - self.config.kv_window, len(cells))
                request.copy[-1].append(sorted(cells[i].key.tolist() for i in kept))
        pages = [self.free.pop() for _ in range(num_pages)]
        self._lent += pages
        return pages

    # ---- one step

    def step(self, counts: dict[str, int], *, compact: bool = True) -> list[Compaction]:
        """Compact the requests that are due, then compute `counts` tokens of each request, or up to a segment's end."""
        if self.config.needs & Need.SEGMENTS:
            length = self.config.policy.segment_options.length
            for name in counts:
                since = self.running[name].num_logical - self.running[name].protected
                counts[name] = min(counts[name], -since if since < 0 else length - since % length)
        orders, accumulations = [], []
        if compact:
            for request in self.running.values():
                due = request.num_resident >= self.keep_of(request) + self.config.kv_buffer or (
                    self.prompt_end_of(request) == request.num_logical and request.num_resident > self.keep_of(request)
                )
                enough = sum(q is not None for q in request.queries) >= self.config.kv_window
                # Most methods are tested on answers; what a prompt takes from others has no queries.
                started = request.num_logical >= request.num_prompt or self.config.policy.compacts_prompt
                if request.managed and due and enough and started:
                    self._observe(request, accumulations, True)
                    orders.append(self.order(request))
                    self._apply_order(request, orders[-1])
        for request in self.running.values():
            self._observe(request, accumulations, False)
        compacted = {order.request_id for order in orders}
        before = {name: self.snapshot(name) for name in self.running if orders and name not in compacted}
        # As the scheduler does it, so that a query that is missing shows.
        records = bool(self.runtime.config.needs & FROM_RECENT_QUERIES) or any(
            self.running[name].num_logical + count > self.running[name].planner.queries_from
            for name, count in counts.items()
        )
        step = StepOrders(orders, self._starting, accumulations, records)
        self.runtime.begin_step(step, self._finished, self._preempted)
        self.free += self._lent
        self._lent = []
        self._starting, self._finished, self._preempted = [], [], []
        for name, content in before.items():
            assert torch.equal(self.snapshot(name), content), f"a compaction changed the cache of {name}"
        self._forward({name: count for name, count in counts.items() if count})
        self._steps += 1
        if orders or self._steps % 5 == 0:
            for name in self.running:
                self.check(name)
        return orders

    def _observe(self, request: Running, accumulations: list[Accumulation], is_compacted: bool) -> None:
        by_segment = bool(self.config.needs & Need.SEGMENTS)
        if not self.config.needs & FROM_RECENT_QUERIES or (request.num_logical < request.num_prompt and not by_segment):
            return
        count = request.planner.accumulate(request.num_logical, is_compacted)
        if count:
            accumulations.append(
                Accumulation(request.name, request.num_logical, request.num_resident, count, list(request.pages))
            )
            if by_segment:
                request.sparsities.append(self._sparsity(request, count))

    def _sparsity(self, request: Running, count: int) -> float:
        """Of the attention of the newest queries, over the layers that count."""
        chosen = self.config.policy.segment_options.layers or range(LAYERS)
        shares = []
        for layer in chosen:
            for head in range(KV_HEADS):
                keys = torch.stack([cell.key for cell in request.dense[layer][head]])
                shares.append(formulas.sparsity(self._grouped(request, layer, head, count), keys))
        return sum(shares) / len(shares)

    @staticmethod
    def _grouped(request: Running, layer: int, head: int, count: int) -> Tensor:
        """The newest queries of a kv head, `[count, group, D]`."""
        group = Q_HEADS // KV_HEADS
        newest = request.queries[request.num_logical - count : request.num_logical]
        return torch.stack([query[layer, head * group : (head + 1) * group] for query in newest])

    def snapshot(self, name: str) -> Tensor:
        """Keys of a request, to see that nothing touches them."""
        request = self.running[name]
        if not request.num_resident:
            return torch.zeros(0)
        return torch.stack([self._read(layer, request, request.num_resident)[0] for layer in range(LAYERS)])

    def _apply_order(self, request: Running, order: Compaction) -> None:
        """The same compaction on the dense lists and on the block table."""
        self._compact_densely(request, order)
        for page in set(order.source_blocks) - set(order.target_blocks):
            self._release(page)
        request.pages = list(order.target_blocks)
        request.num_evicted += order.num_resident - order.num_keep
        request.num_compactions += 1
        request.planner.committed(order.num_logical)

    def _forward(self, counts: dict[str, int]) -> None:
        if not counts:
            return
        names = list(counts)
        starts = np.array([self.running[n].num_logical for n in names], dtype=np.int64)
        step = np.array([counts[n] for n in names], dtype=np.int32)
        evicted = self.runtime.prepare(StepBatch(names, step, starts, sum(counts.values())))
        self.last_evicted = evicted
        wanted = [self.running[n].num_evicted for n in names]
        assert (evicted is None and not any(wanted)) or evicted.device.tolist() == evicted.host.tolist() == wanted
        total = sum(counts.values())
        queries = self.random(LAYERS, total, Q_HEADS, DIM)
        keys, values = self.random(LAYERS, total, KV_HEADS, DIM), self.random(LAYERS, total, KV_HEADS, DIM)
        token_ids, hidden = [], []
        for layer, impl in enumerate(self.impls):
            impl.forward(None, queries[layer])
        entering, slots = self.random(LAYERS, total, HIDDEN), []
        for layer, block in enumerate(self.blocks):
            block(positions=None, hidden_states=entering[layer])
        row = 0
        for name in names:
            request = self.running[name]
            for _ in range(counts[name]):
                token = self._next_token(request)
                state = self.topics[self._topic[name]] + 0.05 * self.random(HIDDEN)
                if token == DOT:
                    self._topic[name] = self.chance.randrange(3)
                token_ids.append(token)
                hidden.append(state)
                request.tokens.append(token)
                request.hidden.append(state)
                request.queries.append(queries[:, row])
                slots.append(self._append(request, keys[:, row], values[:, row], entering[:, row]))
                self._weigh(request)
                row += 1
        padding, logits = 3, None
        if self.config.needs & Need.LOOKAHEAD:
            logits = self.random(len(names), 16)
            for name, each in zip(names, logits, strict=True):
                self.running[name].logits = (
                    each if self.running[name].num_logical == self.running[name].num_prompt else None
                )
        output = ForwardOutput(
            torch.tensor(token_ids + [DOT] * padding),
            torch.tensor(slots + [-1] * padding),
            torch.stack([*hidden, *(torch.ones(HIDDEN),) * padding]),
            logits,
        )
        self.runtime.finish_forward(output)

    def _next_token(self, request: Running) -> int:
        """A random word, or the next one of a stretch of the request's text that is said again."""
        if self.config.needs & Need.RECURRENCE and not request.again and self.chance.random() < 0.05:
            start = self.chance.randrange(len(request.tokens) + 1)
            request.again = request.tokens[start : start + 12][::-1]
        return request.again.pop() if request.again else self.chance.choice([DOT, *WORDS])

    def _weigh(self, request: Running) -> None:
        """Count the attention of the newest query, from the prompt's last token on."""
        if not self.config.needs & ACCUMULATED or request.num_logical < request.num_prompt:
            return
        group = Q_HEADS // KV_HEADS
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                cells = request.dense[layer][head]
                query = request.queries[-1][layer, head * group : (head + 1) * group]
                if self.config.needs & Need.OUTPUT_ERROR:
                    values = torch.stack([cell.value for cell in cells])
                    for cell, error in zip(cells, error_of(query, [c.key for c in cells], values), strict=True):
                        known = request.errors.get((layer, head, cell.position), (0.0, 0.0))
                        request.errors[layer, head, cell.position] = (known[0] + error, known[1] + 1)
                    continue
                for cell, weight in zip(cells, attention_of(query, [c.key for c in cells]), strict=True):
                    key = (layer, head, cell.position)
                    request.mass[key] = request.mass.get(key, 0.0) + weight

    def _append(self, request: Running, key: Tensor, value: Tensor, hidden: Tensor) -> int:
        """Write a token; the slot of the cache that it got."""
        slot = request.num_resident
        if slot == len(request.pages) * self.block_size:
            request.pages.append(self._allocate())
        block, offset = request.pages[slot // self.block_size], slot % self.block_size
        assert self.references[block] == 1, "a shared page is written"
        size = self.layers[0].page_size
        page = torch.tensor(block * self.ratio + offset // size)
        read = self.config.gates is not None
        for layer, pages in enumerate(self.layers):
            betas = formulas.log_beta(gates().layers[layer], hidden[layer]) if read else [0.0] * KV_HEADS
            content = (
                [torch.cat([key[layer], value[layer]], -1)] if len(pages.cells) == 1 else [key[layer], value[layer]]
            )
            for cell, vectors in zip(pages.cells, content, strict=True):
                cell.scatter(page, torch.arange(KV_HEADS), torch.tensor(offset % size), vectors)
            for head in range(KV_HEADS):
                cell = Cell(request.num_logical, key[layer, head], value[layer, head], betas[head])
                request.dense[layer][head].append(cell)
        request.num_logical += 1
        return block * self.block_size + offset

    # ---- reading the cache

    def _read(self, layer: int, request: Running, length: int) -> tuple[Tensor, Tensor]:
        """K and V of a request by slot, `[H, length, D]` each."""
        size = self.layers[layer].page_size
        slot = torch.arange(length)
        page = torch.tensor(request.pages)[slot // self.block_size] * self.ratio + slot % self.block_size // size
        read = [
            cell.gather(page.expand(KV_HEADS, -1), torch.arange(KV_HEADS)[:, None], (slot % size).expand(KV_HEADS, -1))
            for cell in self.layers[layer].cells
        ]
        return (read[0][..., :DIM], read[0][..., DIM:]) if len(read) == 1 else (read[0], read[1])

    @property
    def cache(self) -> KVCache:
        """The runtime's cache."""
        assert self.runtime._compactor is not None
        return self.runtime._compactor.cache

    def positions(self, name: str) -> Tensor:
        """Positions by slot as the runtime has them, `[layers, H, resident]`."""
        request, state = self.running[name], self.runtime._requests.get(name)
        if state is None:
            return torch.arange(request.num_resident).expand(LAYERS, KV_HEADS, -1)
        return self.cache.positions_of(request.pages, request.num_resident, state.num_placed, request.num_evicted)

    def check(self, name: str) -> None:
        """The cache holds exactly the dense tokens, each with its position, and in the pages' first slots."""
        request = self.running[name]
        length = request.num_resident
        assert len(request.pages) == ceil_div(length, self.block_size)
        if not length:
            return
        positions = self.positions(name)
        for layer in range(LAYERS):
            keys, values = self._read(layer, request, length)
            for head in range(KV_HEADS):
                cells = request.dense[layer][head]
                assert len(cells) == length
                order = positions[layer, head].argsort()
                assert positions[layer, head][order].tolist() == [cell.position for cell in cells], name
                assert torch.equal(keys[head][order], torch.stack([cell.key for cell in cells])), name
                assert torch.equal(values[head][order], torch.stack([cell.value for cell in cells])), name
        # What gates said follows the tokens of requests that read it, and of others until they are compacted.
        state = self.runtime._requests.get(name)
        if self.runtime.signals.gates is not None and (not request.num_evicted or state.needs & Need.GATES):
            found = self.runtime.signals.gates.by_slot(self.cache.table([request.pages]), length)[0]
            found = found.gather(-1, positions.argsort(dim=-1))
            wanted = [[[cell.log_beta for cell in cells] for cells in heads] for heads in request.dense]
            torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-6)

    # ---- the dense reference

    def _compact_densely(self, request: Running, order: Compaction) -> None:
        sentence, penalty = self._sentences(request)
        if self.config.needs & Need.SEGMENTS:
            self._shrink(request, order)
        scores = [
            [self._scores(request, layer, head, penalty, order) for head in range(KV_HEADS)] for layer in range(LAYERS)
        ]
        policy = self.runtime._requests[request.name].policy if request.name in self.runtime._requests else None
        policy = policy or self.config.policy
        first = max(request.protected, policy.num_sinks)
        question = range(request.num_prompt - policy.num_question(self.config.kv_window), request.num_prompt)

        def pinned(position: int) -> bool:
            return position < first or position in question or position >= order.num_logical - self.config.kv_window

        left = policy.decay ** (self.config.kv_buffer / 128)
        request.errors = {key: (left * e, left * n) for key, (e, n) in request.errors.items()}
        if self.config.kv_granularity == "head":
            for layer in range(LAYERS):
                for head in range(KV_HEADS):
                    cells = request.dense[layer][head]
                    free = [i for i, cell in enumerate(cells) if not pinned(cell.position)]
                    free.sort(key=lambda i: (-scores[layer][head][i], i))
                    room = order.num_keep - (len(cells) - len(free))
                    gone = set(free[room:])
                    request.dense[layer][head] = [cell for i, cell in enumerate(cells) if i not in gone]
            return
        positions = [cell.position for cell in request.dense[0][0]]
        groups: dict[int, list[int]] = {}
        for i, position in enumerate(positions):
            if not pinned(position):
                groups.setdefault(sentence(position), []).append(i)
        mean = [sum(scores[a][h][i] for a in range(LAYERS) for h in range(KV_HEADS)) for i in range(len(positions))]
        worth = {number: sum(mean[i] for i in tokens) / len(tokens) for number, tokens in groups.items()}
        gone = set()
        for number in sorted(groups, key=lambda n: (worth[n], n)):
            gone |= set(groups[number][: len(positions) - order.num_keep - len(gone)])
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                cells = request.dense[layer][head]
                request.dense[layer][head] = [cell for i, cell in enumerate(cells) if i not in gone]

    def _segment(self, request: Running, position: int) -> int | None:
        """Number of the segment of a token; None for the prompt's and the window's."""
        if not request.protected <= position < request.num_logical - self.config.kv_window:
            return None
        return (position - request.protected) // self.config.policy.segment_options.length

    def _shrink(self, request: Running, order: Compaction) -> None:
        """How many tokens of each segment may stay."""
        policy, window = self.config.policy, self.config.kv_window
        numbers = [self._segment(request, position) for position in range(request.num_logical)]
        sizes = [numbers.count(number) for number in sorted({n for n in numbers if n is not None})]
        num_free = order.num_keep - request.protected - window
        bounds = policy.transition_above, policy.execution_below
        found = formulas.quotas(request.sparsities, request.steps, sizes, num_free, *bounds)
        request.quota, request.shrinks, request.steps = found

    def _sentences(self, request: Running):
        """Functions position -> number of its sentence, and -> penalty of it."""
        text = request.tokens[request.first_tracked :]
        found = split_sentences(text, TABLES)
        starts = [s.start + request.first_tracked for s in found]
        ends = [s.end + request.first_tracked for s in found]
        if self.config.needs & Need.RECURRENCE:
            grams = [tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)]
            again = {i + k for i, gram in enumerate(grams) if gram in grams[i + 1 :] for k in range(GRAM)}
            penalties = [sum(i in again for i in range(s.start, s.end)) / (s.end - s.start) for s in found]
        else:
            penalties = self._similarities(request, list(zip(starts, ends, strict=True)))

        def number(position: int) -> int:
            if position < request.first_tracked:
                return 0
            return next((n + 1 for n, end in enumerate(ends) if position < end), len(ends) + 1)

        def penalty(position: int) -> float:
            n = number(position)
            return penalties[n - 1] if 0 < n <= len(penalties) else 0.0

        return number, penalty

    def _similarities(self, request: Running, spans: list[tuple[int, int]]) -> list[float]:
        """Of each sentence the cosine with the later one that is most like it, 0 where none is above the threshold."""
        unit = []
        for start, end in spans:
            stop = next(i for i in range(start, end) if request.tokens[i] == DOT) + 1
            mean = torch.stack(request.hidden[start:stop]).double().mean(0)
            unit.append(mean / mean.norm())
        threshold = self.config.policy.sentence_options.similarity_threshold
        penalties = []
        for i in range(len(unit)):
            cosines = [float(unit[i] @ unit[j]) for j in range(i + 1, len(unit))]
            penalties.append(max([c for c in cosines if c > threshold], default=0.0))
        return penalties

    def _snapkv(self, request: Running, layer: int, head: int, num_logical: int, pool: int) -> list[float]:
        cells, window, group = request.dense[layer][head], self.config.kv_window, Q_HEADS // KV_HEADS
        total = [0.0] * len(cells)
        for position in range(num_logical - window, num_logical):
            query = request.queries[position][layer, head * group : (head + 1) * group]
            seen = [cell.key for cell in cells if cell.position <= position]
            for j, weight in enumerate(attention_of(query, seen)):
                total[j] += weight
        old, reach = total[:-window], pool // 2
        return [max(old[max(0, i - reach) : i + reach + 1]) for i in range(len(old))] + [0.0] * window

    def _scores(self, request: Running, layer: int, head: int, penalty, order: Compaction) -> list[float]:
        state = self.runtime._requests.get(request.name)
        policy = self.config.policy if state is None else state.policy
        cells = request.dense[layer][head]
        if policy.name == "streaming_llm":
            return [float(cell.position) for cell in cells]
        num_logical, window = order.num_logical, self.config.kv_window
        if policy.name == "random":
            return [hashed(policy.seed, layer, head, cell.position, num_logical) for cell in cells]
        if policy.name == "h2o":
            oldest_recent = num_logical - int(policy.recent_share * order.num_keep)
            masses = [request.mass.get((layer, head, cell.position), 0.0) for cell in cells]
            # The newest before the others, and before the heaviest.
            return [1e6 + c.position if c.position >= oldest_recent else m for c, m in zip(cells, masses, strict=True)]
        if policy.name == "trimkv":
            return formulas.trimkv([cell.log_beta for cell in cells], [cell.position for cell in cells])
        keys = torch.stack([cell.key for cell in cells])
        if policy.needs & Need.OUTPUT_ERROR:
            known = [request.errors.get((layer, head, cell.position), (0.0, 0.0)) for cell in cells]
            return formulas.skipkv(
                [error / max(seen_by, 1) for error, seen_by in known],
                keys,
                [penalty(cell.position) for cell in cells],
                [cell.position for cell in cells],
                range(request.protected, num_logical - window),
                num_logical - formulas.num_recent(order.num_keep, request.protected),
            )
        queries = self._grouped(request, layer, head, window)
        if policy.name == "thinkv":
            numbers = [self._segment(request, cell.position) for cell in cells]
            return formulas.thinkv(keys, numbers, request.quota, request.shrinks)
        group = Q_HEADS // KV_HEADS
        if policy.name == "laq" and request.lookahead_queries is not None:
            drafted = request.lookahead_queries[layer, :, head * group : (head + 1) * group]
            return formulas.laq(drafted, queries if policy.with_window else queries[:0], keys, window)
        if policy.name in ("snapkv", "laq"):
            return self._snapkv(request, layer, head, num_logical, policy.pool)
        if policy.name == "finch":
            in_prompt = num_logical <= request.num_prompt
            if request.asked is not None:
                asking = request.lookahead_queries[layer, :, head * group : (head + 1) * group]
                extended = torch.cat([keys, request.asked[layer, :, head]])
                return formulas.finch(asking, extended)[: len(cells)]
            return formulas.finch(queries[-policy.num_question(window) :] if in_prompt else queries, keys)
        if policy.name not in ("rkv", "skipkv"):
            values = torch.stack([cell.value for cell in cells])
            mass = torch.tensor([request.mass.get((layer, head, cell.position), 0.0) for cell in cells])
            options = {k: v for k, v in vars(policy).items() if v != getattr(type(policy), k)}
            return formulas.score(policy.name, options, queries, keys, values, mass)
        importance = importance_of(queries, keys, window, policy.pool)
        redundancy = redundancy_of(keys, policy.redundancy_threshold)
        scores = [policy.mix * i - (1 - policy.mix) * r for i, r in zip(importance, redundancy, strict=False)]
        scores += [0.0] * window
        if policy.name == "skipkv":
            scores = [s - penalty(cell.position) for s, cell in zip(scores, cells, strict=True)]
        return scores
