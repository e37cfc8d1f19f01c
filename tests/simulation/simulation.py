"""`Simulation` plays the scheduler and the model runner around an `EvictionRuntime`."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import ceil_div
from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Accumulation, Compaction, Started, StepOrders
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.signals.base import ForwardOutput
from tests.reference import formulas
from tests.simulation.decoder import FakeDecoder
from tests.simulation.dense import Dense
from tests.simulation.model import DIM, DOT, HIDDEN, KV_HEADS, LAYERS, Q_HEADS, VOCABULARY, WORDS, gates, gates_file
from tests.simulation.planning import Planning
from tests.simulation.pool import Pool
from tests.simulation.request import Cell, Running
from tests.simulation.worker import Worker

NUM_PADDING = 3


class Simulation:
    """Requests on a worker without vLLM, every token of them also kept in plain lists.

    It allocates blocks, draws random K, V, queries and hidden states, writes them where the runtime expects them, and
    orders compactions. `Dense` does every compaction a second time.

    Args:
        policy, granularity, window, protect, parameters, buffer: of the server.
        layout: "gpu", "gpu strided" or "vec".
        ratio: kernel pages per block.
        num_rows: requests that can run at once.
        num_blocks, page_size: of the KV cache.
        num_layers: of the model.
        seed: of everything random.
        max_length: tokens of the longest request.
        max_tokens: tokens of the largest step.

    Attributes:
        running: requests by name.
        has_spare_blocks: whether there are blocks to compute tokens ahead.
        num_replaced: shared blocks that compactions replaced.
        last_evicted: evicted tokens of each request of the last batch, as the runtime returned them.
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
        num_layers: int = LAYERS,
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
        self.num_layers = num_layers
        self.running: dict[str, Running] = {}
        self.has_spare_blocks = True
        self.num_replaced = 0
        self.last_evicted: np.ndarray | None = None
        self.pool = Pool(
            layout,
            num_layers=num_layers,
            num_blocks=num_blocks,
            page_size=page_size,
            ratio=ratio,
            chance=self.chance,
        )
        self.block_size = self.pool.block_size
        self._decoder = FakeDecoder(self, max_length) if self.config.needs & Need.LOOKAHEAD else None
        self.worker = Worker(
            self.config,
            self.pool,
            num_rows=num_rows,
            max_length=max_length,
            max_tokens=max_tokens,
            decoder=self._decoder,
        )
        self.runtime = self.worker.runtime
        self.dense = Dense(self.config, self.worker)
        self.planning = Planning(self.config)
        self._generator = torch.Generator().manual_seed(seed)
        self._topics = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
        self._topic: dict[str, int] = {}
        self._starting: list[Started] = []
        self._finished: list[str] = []
        self._preempted: list[str] = []
        self._lookahead_blocks: list[int] = []
        self._num_steps = 0

    def random(self, *shape: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(*shape, generator=self._generator)

    # ---- the scheduler

    def start(
        self, name: str, num_prompt: int, budget: int, *, policy: str | None = None, shared_with: str | None = None
    ) -> Running:
        """Add a request.

        Args:
            name: its id.
            num_prompt: tokens of its prompt.
            budget: its budget.
            policy: its method, or "none" for an unmanaged request; default: the server's.
            shared_with: request whose full blocks of the prompt it takes from the prefix cache.
        """
        dense: list[list[list[Cell]]] = [[[] for _ in range(KV_HEADS)] for _ in range(self.num_layers)]
        request = Running(name, num_prompt, budget, 0, policy != "none", dense)
        request.protected = num_prompt if self.config.kv_protect_prompt and request.managed else 0
        if shared_with is not None:
            self._share(request, self.running[shared_with])
        request.first_tracked = request.protected or request.num_logical
        self.running[name] = request
        self._topic[name] = 0
        if request.managed:
            self.planning.start(request)
            self._starting.append(
                Started(name, policy or self.config.kv_policy, num_prompt, request.protected, request.first_tracked)
            )
        return request

    def _share(self, request: Running, other: Running) -> None:
        assert not other.num_evicted
        full = min(request.num_prompt - 1, other.num_logical) // self.block_size
        request.blocks = other.blocks[:full]
        self.pool.share(request.blocks)
        request.share(other, full * self.block_size)

    def stop(self, name: str, *, preempt: bool = False) -> None:
        """Finish or preempt a request."""
        for block in self.running.pop(name).blocks:
            self.pool.release(block)
        (self._preempted if preempt else self._finished).append(name)

    def keep_of(self, request: Running) -> int:
        """Return the tokens left by a compaction."""
        return self.planning.keep(request)

    def order(self, request: Running) -> Compaction:
        """Plan a compaction; shared blocks that are not wholly protected are replaced."""
        keep = self.keep_of(request)
        target = request.blocks[: ceil_div(keep, self.block_size)]
        for i in range(request.protected // self.block_size, len(target)):
            if self.pool.references[target[i]] > 1:
                target[i] = self.pool.allocate()
                self.num_replaced += 1
        num_blocks = self._decoder.draw(request, keep) if self._decoder is not None else 0
        blocks = [self.pool.free.pop() for _ in range(num_blocks)]
        self._lookahead_blocks += blocks
        return Compaction(
            request.name,
            request.num_logical,
            request.num_resident,
            keep,
            list(request.blocks),
            target,
            request.num_compactions,
            blocks,
        )

    # ---- one step

    def step(self, counts: dict[str, int], *, compact: bool = True) -> list[Compaction]:
        """Compact the requests that are due, then compute `counts` tokens of each request, or up to a segment's end."""
        if self.config.needs & Need.SEGMENTS:
            length = self.config.policy.segment_options.length
            for name in counts:
                since = self.running[name].num_logical - self.running[name].protected
                counts[name] = min(counts[name], -since if since < 0 else length - since % length)
        orders: list[Compaction] = []
        accumulations: list[Accumulation] = []
        for request in self.running.values():
            if compact and self.planning.is_due(request):
                self._accumulate(request, accumulations, is_compacted=True)
                orders.append(self.order(request))
                self._apply(request, orders[-1])
        for request in self.running.values():
            self._accumulate(request, accumulations, is_compacted=False)
        compacted = {order.request_id for order in orders}
        before = {name: self._keys(name) for name in self.running if orders and name not in compacted}
        lengths = [(self.running[name], self.running[name].num_logical + count) for name, count in counts.items()]
        step = StepOrders(orders, self._starting, accumulations, self.planning.records_queries(lengths))
        self.runtime.begin_step(step, self._finished, self._preempted)
        self.pool.free += self._lookahead_blocks
        self._starting, self._finished, self._preempted, self._lookahead_blocks = [], [], [], []
        for name, keys in before.items():
            assert torch.equal(self._keys(name), keys), f"a compaction changed the cache of {name}"
        self._forward({name: count for name, count in counts.items() if count})
        self._num_steps += 1
        if orders or self._num_steps % 5 == 0:
            for name in self.running:
                self.check(name)
        return orders

    def _accumulate(self, request: Running, accumulations: list[Accumulation], *, is_compacted: bool) -> None:
        count = self.planning.accumulate(request, is_compacted=is_compacted)
        if count:
            accumulations.append(
                Accumulation(request.name, request.num_logical, request.num_resident, count, list(request.blocks))
            )
            if self.config.needs & Need.SEGMENTS:
                request.segments.sparsities.append(self.dense.sparsity(request, count))

    def _apply(self, request: Running, order: Compaction) -> None:
        """Carry out an order on the dense tokens and on the block table."""
        self.dense.compact(request, order)
        for block in set(order.source_blocks) - set(order.target_blocks):
            self.pool.release(block)
        request.blocks = list(order.target_blocks)
        request.num_evicted += order.num_resident - order.num_keep
        request.num_compactions += 1
        self.planning.committed(request, order)

    def _keys(self, name: str) -> Tensor:
        """Keys of a request, to see that nothing touches them."""
        request = self.running[name]
        if not request.num_resident:
            return torch.zeros(0)
        layers = range(self.num_layers)
        return torch.stack([self.pool.read(layer, request.blocks, request.num_resident)[0] for layer in layers])

    # ---- the forward pass

    def _forward(self, counts: dict[str, int]) -> None:
        if not counts:
            return
        names, total = list(counts), sum(counts.values())
        self._prepare(names, counts, total)
        queries = self.random(self.num_layers, total, Q_HEADS, DIM)
        keys, values = (self.random(self.num_layers, total, KV_HEADS, DIM) for _ in range(2))
        for layer, attention in enumerate(self.worker.attention):
            attention.forward(None, queries[layer])
        entering = self.random(self.num_layers, total, HIDDEN)
        for layer, block in enumerate(self.worker.attention_blocks):
            block(positions=None, hidden_states=entering[layer])
        token_ids, hidden, slots = [DOT] * (total + NUM_PADDING), torch.ones(total + NUM_PADDING, HIDDEN), []
        for row, name in enumerate([each for each in names for _ in range(counts[each])]):
            request = self.running[name]
            token_ids[row] = self._next_token(request)
            hidden[row] = self._topics[self._topic[name]] + 0.05 * self.random(HIDDEN)
            if token_ids[row] == DOT:
                self._topic[name] = self.chance.randrange(3)
            request.tokens.append(token_ids[row])
            request.hidden.append(hidden[row])
            request.queries.append(queries[:, row])
            slots.append(self._append(request, keys[:, row], values[:, row], entering[:, row]))
            self.dense.accumulate(request)
        slots += [-1] * NUM_PADDING
        logits = self._draw_logits(names) if self._decoder is not None else None
        produced = (hidden, None if logits is None else lambda: logits)
        self.runtime.finish_forward(
            ForwardOutput(torch.tensor(token_ids, dtype=torch.int32), torch.tensor(slots), *produced)
        )

    def _prepare(self, names: list[str], counts: dict[str, int], total: int) -> None:
        """Prepare the runtime, and check the counts of evicted tokens that it returns."""
        starts = np.array([self.running[n].num_logical for n in names], dtype=np.int64)
        step = np.array([counts[n] for n in names], dtype=np.int32)
        self.last_evicted = evicted = self.runtime.prepare(StepBatch(names, step, starts, total))
        wanted = [self.running[n].num_evicted for n in names]
        assert (evicted is None and not any(wanted)) or evicted.device.tolist() == evicted.host.tolist() == wanted

    def _draw_logits(self, names: list[str]) -> Tensor:
        logits = self.random(len(names), VOCABULARY)
        for name, each in zip(names, logits, strict=True):
            request = self.running[name]
            request.logits = each if request.num_logical == request.num_prompt else None
        return logits

    def _next_token(self, request: Running) -> int:
        """Return a random word, or the next one of a stretch of the request's text that is repeated."""
        if self.config.needs & Need.RECURRENCE and not request.repeats and self.chance.random() < 0.05:
            start = self.chance.randrange(len(request.tokens) + 1)
            request.repeats = request.tokens[start : start + 12][::-1]
        return request.repeats.pop() if request.repeats else self.chance.choice([DOT, *WORDS])

    def _append(self, request: Running, key: Tensor, value: Tensor, hidden: Tensor) -> int:
        """Write a token; return its slot of the cache."""
        slot = request.num_resident
        if slot == len(request.blocks) * self.block_size:
            request.blocks.append(self.pool.allocate())
        block, offset = request.blocks[slot // self.block_size], slot % self.block_size
        assert self.pool.references[block] == 1, "a shared block is written"
        for layer, heads in enumerate(request.dense):
            betas = [0.0] * KV_HEADS
            if self.config.gates is not None:
                betas = formulas.log_beta(gates().layers[layer], hidden[layer])
            self.pool.write(layer, block, offset, key[layer], value[layer])
            for head, cells in enumerate(heads):
                cells.append(Cell(request.num_logical, key[layer, head], value[layer, head], betas[head]))
        request.num_logical += 1
        return block * self.block_size + offset

    # ---- checks

    def positions(self, name: str) -> Tensor:
        """Return positions by slot as the runtime has them, `[layers, H, resident]`."""
        return self.worker.positions(self.running[name])

    def check(self, name: str) -> None:
        """The cache holds exactly the dense tokens, each with its position, in the first slots of the blocks."""
        request = self.running[name]
        length = request.num_resident
        assert len(request.blocks) == ceil_div(length, self.block_size)
        if not length:
            return
        positions = self.positions(name)
        for layer, heads in enumerate(request.dense):
            keys, values = self.pool.read(layer, request.blocks, length)
            for head, cells in enumerate(heads):
                assert len(cells) == length
                order = positions[layer, head].argsort()
                assert positions[layer, head][order].tolist() == [cell.position for cell in cells], name
                assert torch.equal(keys[head][order], torch.stack([cell.key for cell in cells])), name
                assert torch.equal(values[head][order], torch.stack([cell.value for cell in cells])), name
        outputs = self.worker.gate_outputs(request)
        if outputs is not None:
            wanted = [[[cell.log_beta for cell in cells] for cells in heads] for heads in request.dense]
            ordered = outputs.gather(-1, positions.argsort(dim=-1))
            torch.testing.assert_close(ordered, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
