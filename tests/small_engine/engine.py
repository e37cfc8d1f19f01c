"""The steps of the small engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.device import to_device
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.signals.base import ForwardOutput
from skipkv_vllm.worker.warm_up import warm_up
from tests.devices import Graph, capture, no_waiting, synchronize
from tests.small_engine import pages
from tests.small_engine.attention import PagedAttention
from tests.small_engine.buffers import Buffers, Filling, Inputs, Placed
from tests.small_engine.checks import Checks
from tests.small_engine.log import Log
from tests.small_engine.model import Activations, Model
from tests.small_engine.scheduler import Running, Scheduled, Scheduler
from tests.small_engine.shape import DOT, Shape
from tests.small_engine.traffic import LAG, Traffic, is_dot, is_repeated
from tests.small_engine.worker import make_runtime

TEMPERATURE = 0.7


@dataclass
class Report:
    """What a run did, and how far it was off.

    Attributes:
        steps, compactions, finished, preempted: how many there were.
        postponed: compactions that waited a step for others.
        handed_over_to_moves, handed_over_to_tokens: blocks that went from one request to another within a step, see
            `Blocks`.
        replaced: shared blocks that compactions replaced.
        replays: decode steps by number of requests and padded rows of the graph, as "3 of 4".
        output_error: largest difference between attention and dense attention over the survivors, relative to numbers
            above 1.
        agreement: share of the survivors, pinned ones left out, that are those of the definition.
        least_agreement: the same of the worst compaction.
        largest_gap: how far beyond the limit the score of a wrong survivor was, in standard deviations of the scores.
    """

    steps: int = 0
    compactions: int = 0
    finished: int = 0
    preempted: int = 0
    postponed: int = 0
    handed_over_to_moves: int = 0
    handed_over_to_tokens: int = 0
    replaced: int = 0
    replays: dict[str, int] = field(default_factory=dict)
    output_error: float = 0.0
    agreement: float = 1.0
    least_agreement: float = 1.0
    largest_gap: float = 0.0

    def count(self, scheduler: Scheduler) -> None:
        """Take over what the scheduler counted."""
        blocks = scheduler.blocks
        self.finished, self.preempted = scheduler.num_finished, scheduler.num_preempted
        self.postponed = scheduler.num_postponed
        self.handed_over_to_moves, self.handed_over_to_tokens = (blocks.handed_over[k] for k in ("moves", "tokens"))
        self.replaced = blocks.num_replaced

    def figures(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


class Engine:
    """Requests on a random model.

    Args:
        config: of the server.
        shape: sizes.
        traffic: how requests come.
        num_requests: how many come.
        seed: of everything random.
        kernel: vLLM's Triton kernel for attention, or None for PyTorch.

    Attributes:
        shape: see above.
        attention: "triton" or "torch".
        runtime: under test.
        report: what has happened so far.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        shape: Shape,
        traffic: Traffic,
        num_requests: int,
        *,
        seed: int = 0,
        kernel: Callable[..., None] | None = None,
    ) -> None:
        self.shape, self.attention = shape, "torch" if kernel is None else "triton"
        self.cache = pages.allocate(shape)
        self.runtime = make_runtime(config, shape, self.cache)
        self._buffers, self._log = Buffers(shape), Log(shape)
        layers = pages.layers_of(self.cache)
        attention = [PagedAttention(layer, shape, self._buffers.table_length, kernel) for layer in layers]
        if self.runtime.signals.queries is not None:
            for i, each in enumerate(attention):
                self.runtime.signals.queries.attach(i, each)
        self.model = Model(shape, seed, attention)
        self.scheduler = Scheduler(config, shape, traffic, traffic.arrivals(num_requests, shape.vocabulary, seed))
        self.checks = Checks(config, shape, self.runtime, self._log, self._buffers.text, layers)
        self._generator = torch.Generator(shape.device).manual_seed(seed)
        self._graphs = self._capture()
        self.report = Report()

    def _capture(self) -> dict[int, tuple[Inputs, Graph[Activations]]]:
        """Run every operator once, then capture decoding for some numbers of rows, as a worker of vLLM does."""
        shape = self.shape
        warm_up(self.runtime, hidden_size=shape.width, dtype=shape.dtype, max_length=shape.max_length)
        self.runtime.prepare_dummy()
        graphs = {}
        with torch.no_grad():
            for size in reversed(shape.graph_sizes):
                inputs = self._buffers.take(size, size, 1)
                inputs.starts.copy_(torch.arange(size + 1, device=self.shape.device))
                graphs[size] = (inputs, capture(lambda inputs=inputs: self.model.forward(inputs), self.shape.device))
        return graphs

    @torch.no_grad()
    def run(self, num_steps: int) -> Report:
        """Run that many steps, or until all requests have ended, and check everything."""
        for _ in range(num_steps):
            if self.scheduler.is_done:
                break
            self.step()
        synchronize(self.shape.device)
        self.report.count(self.scheduler)
        self.checks.conclude(self.report)
        return self.report

    @torch.no_grad()
    def step(self) -> None:
        """Schedule a step, compact, and run the model."""
        device = self.shape.device
        with no_waiting(device):
            scheduled = self.scheduler.step()
            self.runtime.begin_step(scheduled.orders, scheduled.finished, scheduled.preempted)
        self.checks.after_compactions(scheduled.orders.compactions)
        with no_waiting(device):
            for request in scheduled.started:
                self._start(request)
            if scheduled.batch:
                self._forward(scheduled)
        self.report.steps += 1
        self.report.compactions += len(scheduled.orders.compactions)

    def _start(self, request: Running) -> None:
        """Set up the text of a request that starts, or starts over."""
        prompt = to_device(request.arrival.prompt, torch.int64, self.shape.device)
        self._buffers.text[request.row, : len(request.arrival.prompt)].copy_(prompt, non_blocking=True)
        if request.shared_from is not None:
            self._log.share(request.row, *request.shared_from)
        self.checks.start(request)

    def _forward(self, scheduled: Scheduled) -> None:
        """Run the model on the tokens of a step, through a graph if every request has one token."""
        batch = scheduled.batch
        counts = np.array([request.count for request in batch], dtype=np.int64)
        starts = np.array([request.num_computed_tokens for request in batch], dtype=np.int64) - counts
        names, total = [request.request_id for request in batch], int(counts.sum())
        evicted = self.runtime.prepare(StepBatch(names, counts, starts, total))
        self.checks.evicted(batch, evicted)
        filling = Filling(
            counts,
            starts,
            np.array([request.row for request in batch], dtype=np.int64),
            [self.scheduler.blocks.blocks(name) for name in names],
        )
        is_decoding = total == len(batch)
        padded = self.shape.padded(len(batch))
        inputs, graph = self._graphs[padded]
        if not is_decoding:
            inputs = self._buffers.take(total, len(batch), int(counts.max()))
        placed = self._buffers.fill(filling, None if evicted is None else evicted.device, inputs)
        if is_decoding:
            graph.replay()
            computed = graph.output
            key = f"{len(batch)} of {padded}"
            self.report.replays[key] = self.report.replays.get(key, 0) + 1
        else:
            computed = self.model.forward(inputs)
        self.runtime.finish_forward(ForwardOutput(inputs.token_ids, inputs.slots, computed.hidden))
        self._log.write(placed, computed)
        self.checks.after_forward(batch, counts, starts, computed)
        self._sample(batch, counts, computed.logits, placed)

    def _sample(self, batch: list[Running], counts: np.ndarray, logits: Tensor, placed: Placed) -> None:
        """Choose the next token of each request whose text ends here, on the device."""
        last = counts.cumsum() - 1
        chosen = [(int(last[i]), each.num_known) for i, each in enumerate(batch) if each.samples]
        for each in batch:
            each.num_known += each.samples
        if not chosen:
            return
        numbers = [(place, int(is_dot(p)), int(is_repeated(p)), max(p - LAG, 0)) for place, p in chosen]
        columns = to_device(np.array(numbers, dtype=np.int64).T.copy(), torch.int64, self.shape.device)
        place, dots, repeats, earlier = columns.unbind()
        noise = torch.empty_like(logits[: len(numbers)]).exponential_(generator=self._generator)
        sampled = ((logits[place] / TEMPERATURE).softmax(dim=-1) / noise).argmax(dim=-1)
        rows, positions = placed.rows[place], placed.positions[place] + 1
        token = torch.where(repeats.bool(), self._buffers.text[rows, earlier], sampled)
        self._buffers.text[rows, positions] = torch.where(dots.bool(), DOT, token)
