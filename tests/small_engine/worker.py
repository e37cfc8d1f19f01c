"""The worker under test: an `EvictionRuntime` with its signals, on any device."""

from __future__ import annotations

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, Need
from skipkv_vllm.ops.paging import PagedCache
from skipkv_vllm.worker.ranks import ALONE
from skipkv_vllm.worker.requests import Rows
from skipkv_vllm.worker.runtime import EvictionRuntime
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.attention_mass import AttentionMass
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.segments import SegmentSparsity
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from skipkv_vllm.worker.signals.sentences import Sentences
from tests.small_engine.shape import TABLES, Shape


def make_ring(config: KVPolicyConfig, shape: Shape) -> QueryRing:
    """Return the query ring of a server."""
    return QueryRing(
        num_layers=shape.layers,
        num_rows=shape.max_requests,
        window=config.kv_window,
        num_kept=config.num_queries,
        num_heads=shape.query_heads,
        head_size=shape.head_size,
        max_tokens=shape.max_tokens,
        dtype=shape.dtype,
        device=shape.device,
    )


def make_signals(config: KVPolicyConfig, shape: Shape) -> Signals:
    """Return what the policies of a server need, learned gates excepted."""
    needs, ring, tracker = config.needs, None, None
    assert not needs & (Need.GATES | Need.LOOKAHEAD)
    if needs & Need.QUERIES:
        ring = make_ring(config, shape)
    if needs & Need.SENTENCES:
        tracker = SentenceTracker(
            TABLES,
            config.policy.sentence_options,
            num_rows=shape.max_requests,
            max_length=shape.max_length,
            hidden_size=shape.width if needs & Need.HIDDEN else 0,
            vocab_size=shape.vocabulary,
            dtype=shape.dtype,
            device=shape.device,
            keeps_text=bool(needs & Need.RECURRENCE),
        )
    return Signals(
        ring,
        Sentences(tracker) if tracker is not None else None,
        AttentionMass(ring, config.kv_buffer, needs) if ring is not None and needs & ACCUMULATED else None,
        SegmentSparsity(ring, config.kv_window, ALONE) if ring is not None and needs & Need.SEGMENTS else None,
    )


def make_runtime(config: KVPolicyConfig, shape: Shape, pages: PagedCache) -> EvictionRuntime:
    """Return the runtime of a server on a cache."""
    runtime = EvictionRuntime(config, Rows(shape.max_requests), make_signals(config, shape), shape.device)
    runtime.bind_cache(pages, shape.block_size)
    return runtime
