"""Requests that are about to be compacted, with random inputs of every kind, for tests of scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.core.limits import ceil_div
from skipkv_vllm.core.needs import ACCUMULATED, Need
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.policies import Policy
from skipkv_vllm.policies.base import Segments
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.compaction_batch import CompactionBatch
from skipkv_vllm.worker.ranks import Ranks
from skipkv_vllm.worker.requests import Job, ManagedRequest
from skipkv_vllm.worker.scoring import Scorer
from skipkv_vllm.worker.signals.base import Inputs
from tests.operators.cases import Pages

WINDOW, GROUP = 5, 2


class Written(NamedTuple):
    """A request: its held tokens, all tokens so far, its prompt, and how much of that is protected.

    `ahead` is the number of its lookahead queries, `question` whether they belong to a question that was appended.
    """

    held: int
    logical: int
    prompt: int = 9
    protected: int = 0
    ahead: int = 0
    question: bool = False


RAGGED = (Written(61, 97, protected=9), Written(40, 40), Written(23, 150, 20, 4))


@dataclass(frozen=True)
class ScoringCase:
    """A batch of requests, compacted by one method.

    Attributes:
        pages: the cache.
        requests: the requests.
        scaled: whether keys have scales.
        sinks: whether the layers have attention sinks.
        seed: of everything random.
    """

    pages: Pages = field(default_factory=Pages)
    requests: tuple[Written, ...] = RAGGED
    scaled: bool = False
    sinks: bool = False
    seed: int = 0

    def build(self, policy: Policy) -> tuple[Scorer, CompactionBatch, Inputs]:
        """Return a scorer and its arguments."""
        generator = torch.Generator().manual_seed(self.seed)
        pages = self.pages
        sizes = [each.held + each.ahead * each.question for each in self.requests]
        counts = [ceil_div(size, pages.size) for size in sizes]
        ids = torch.randperm(sum(counts), generator=generator) + 1
        caches = pages.empty(len(ids) + 1)
        scales = None
        if self.scaled:
            scales = torch.rand(pages.layers, pages.heads, generator=generator) + 0.2
        sinks = torch.randn(pages.layers, pages.heads * GROUP, generator=generator) * 2 if self.sinks else None
        cache = KVCache(caches, pages.size, scales, None if sinks is None else lambda: sinks)
        jobs = []
        for row, (each, own) in enumerate(zip(self.requests, ids.split(counts), strict=True)):
            self._write(cache, own.int(), each, policy, generator)
            order = Compaction(str(row), each.logical, each.held, max(each.held - 9, 8), own.tolist(), own.tolist(), 0)
            request = ManagedRequest(row, policy, policy.needs, each.prompt, each.protected, num_placed=each.held)
            if each.ahead:
                shape = (pages.layers, each.ahead, pages.heads * GROUP, pages.dim)
                request.lookahead_queries = self._queries(shape, generator)
                request.num_question = each.ahead * each.question
            jobs.append(Job(order, request))
        batch = CompactionBatch.of(jobs, cache, WINDOW)
        ranks = Ranks(layers=tuple(range(3, 3 + 2 * pages.layers, 2)), first_head=2)
        return Scorer(cache, WINDOW, ranks), batch, self._inputs(batch, generator)

    def _queries(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        dtype = torch.float32 if self.pages.dtype.itemsize == 1 else self.pages.dtype
        return torch.randn(shape, generator=generator).to(dtype)

    def _write(self, cache: KVCache, table: Tensor, each: Written, policy: Policy, generator: torch.Generator) -> None:
        """Write keys, values and positions of a request; every head holds tokens of its own, in any order."""
        pages = self.pages
        shape = (pages.layers, pages.heads, each.held + each.ahead * each.question, pages.dim)
        pages.write_keys(cache.pages, table, torch.randn(shape, generator=generator))
        pages.write_values(cache.pages, table, torch.randn(shape, generator=generator))
        question = min(policy.num_question(WINDOW), each.prompt)
        pinned = {
            *range(each.protected),
            *range(each.prompt - question, min(each.prompt, each.logical)),
            *range(each.logical - WINDOW, each.logical),
        }
        free = torch.tensor([place for place in range(each.logical) if place not in pinned])
        slot = torch.arange(each.held)
        for layer in cache.sidecar:
            for head in range(pages.heads):
                chosen = free[torch.randperm(len(free), generator=generator)[: each.held - len(pinned)]]
                held = torch.cat([chosen, torch.tensor(sorted(pinned))])
                held = held[torch.randperm(each.held, generator=generator)]
                layer[table[slot // pages.size].long(), head, slot % pages.size] = held.int()

    def _inputs(self, batch: CompactionBatch, generator: torch.Generator) -> Inputs:
        policy, shape, inputs = batch.policy, batch.positions.shape, Inputs()
        resident = batch.num_resident.view(-1, 1, 1, 1)
        is_held = torch.arange(batch.length) < resident
        if policy.needs & Need.QUERIES:
            inputs.queries = self._queries((*shape[:2], WINDOW, shape[2] * GROUP, self.pages.dim), generator)
        if policy.needs & (Need.HIDDEN | Need.RECURRENCE):
            inputs.penalties = torch.rand(shape, generator=generator)
        if policy.needs & ACCUMULATED:
            kinds = 2 if policy.needs & Need.OUTPUT_ERROR else 1
            inputs.sums = torch.rand(kinds, *shape, generator=generator) * is_held
            inputs.sums[1:] = (inputs.sums[1:] * 40).round()
        if policy.needs & Need.GATES:
            inputs.gates = -torch.rand(shape, generator=generator)
        if policy.needs & Need.SEGMENTS:
            inputs.segments = _segments(batch, generator)
        return inputs


def _segments(batch: CompactionBatch, generator: torch.Generator) -> Segments:
    """Random segments, whose sparsity makes them of all kinds."""
    length = batch.policy.segment_options.length
    written = [o.num_logical - WINDOW - r.protected for o, r in batch.jobs]
    counts = [ceil_div(each, length) for each in written]
    place = torch.arange(max(counts))
    sizes = torch.tensor([[min(max(each - int(i) * length, 0), length) for i in place] for each in written])
    sparsity = torch.rand(sizes.shape, generator=generator)
    sparsity[(sizes < length) | (place >= torch.tensor(counts)[:, None])] = -1.0
    memory = torch.randint(0, 3, sizes.shape, generator=generator) * (place < torch.tensor(counts)[:, None])
    free = torch.tensor([o.num_keep - r.protected - WINDOW for o, r in batch.jobs])
    known = Segments(sparsity, memory, sizes, free, length)
    return Segments(sparsity, batch.policy.remember(known), sizes, free, length)
