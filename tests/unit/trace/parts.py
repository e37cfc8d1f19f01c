"""Parts of traces for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from skipkv_vllm.core.orders import Compaction, Started
from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.trace.collector import TraceCollector
from skipkv_vllm.trace.files import trace_path
from skipkv_vllm.trace.writer import TraceWriter
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens

DOT = 9
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
LAYERS, HEADS = 2, 3


def make_collector(folder, ranks: int = 1, tables: SentenceTables | None = TABLES, stages: int = 1) -> TraceCollector:
    return TraceCollector(str(folder), (stages, ranks), tables, {"model": "m", "kv_budget": 16})


def finish(collector: TraceCollector, request_id: str, *texts: list[int]) -> Path:
    """Write a trace and wait for it."""
    collector.finish(request_id, *texts)
    assert collector.flush()
    return trace_path(collector._folder, request_id)


def order(request_id: str, ordinal: int, logical: int, resident: int, keep: int) -> Compaction:
    return Compaction(request_id, logical, resident, keep, [1, 2], [1], ordinal)


def kept(rank: int, seed: int, keep: int) -> Tensor:
    """Survivors of one rank: ascending positions that differ by layer, head and rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    rows = [torch.randperm(40, generator=generator)[:keep].sort().values for _ in range(LAYERS * HEADS)]
    return torch.stack(rows).view(LAYERS, HEADS, keep)


def similar(slot: int) -> tuple[Tensor, Tensor]:
    """Sentences 0 and 2 are similar, sentence 1 is not."""
    tracker = SentenceTracker(
        TABLES,
        SentenceOptions(0.9, 16),
        num_rows=2,
        max_length=50,
        hidden_size=2,
        vocab_size=10,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tracker.reset(1, 0)
    tracker.update(
        TrackedTokens(
            token_ids=torch.tensor([3, DOT, 4, DOT, 3, DOT]),
            spans=torch.tensor([[1], [0], [6], [0]]),
            num_tokens=6,
            hidden=torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]]),
        )
    )
    return tracker.similar_pairs(slot)


def compact_once(collector: TraceCollector, writer: TraceWriter, request_id: str) -> None:
    start, one = Started(request_id, "rkv", 1, 1, 1), order(request_id, 0, 24, 24, 16)
    collector.sent([one] if request_id in collector._logs else [], [start])
    collector.sent([one], [])
    writer.started(request_id)
    writer.compacted(one, kept(0, 0, 16), None)
