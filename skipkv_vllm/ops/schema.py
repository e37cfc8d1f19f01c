"""The operators `torch.ops.skipkv.*`: their schemas, fake twins, and which backend runs each on which device.

The schemas are the contract between the runtime and every backend (C++, CUDA, Triton, PyTorch). Sizes:

    R requests, L layers, H kv heads, Hq query heads, D head size, P tokens a page, N slots (longest request),
    W window, M moves, T tokens of a step, E hidden size

`caches` are vLLM's tensors, one a layer, `[pages, H, P, 2 * D]`, all of one shape, dtype and strides; `pointers` int64
`[L]` are their addresses on the device, for kernels that take all layers at once; `layout` says how a page is packed
(`Layout`). Tables hold int32 page ids; ids past a request's pages are never read. Per-request lengths are int32 `[R]`
on the device. Scores and positions are `[R, L, H, N]` by slot; what lies past a request's length is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "skipkv"

SCHEMAS = {
    "score_tokens": (
        "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, "
        "Tensor queries, Tensor? penalty, int pool, float mix, float threshold) -> Tensor"
    ),
    "measure_attention": (
        "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, "
        "Tensor queries, Tensor num_queries, Tensor newest, bool output_error) -> Tensor"
    ),
    "key_similarity": (
        "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor num_resident, int length) -> Tensor"
    ),
    "select_keep": (
        "(Tensor scores, Tensor positions, Tensor num_resident, Tensor num_keep, Tensor pin_below, Tensor pin_from, "
        "int max_moves) -> (Tensor source, Tensor hole, Tensor count)"
    ),
    "compact_pages": (
        "(Tensor(a!)[] caches, Tensor pointers, int layout, Tensor(b!) sidecar, Tensor positions, "
        "Tensor source_table, Tensor target_table, Tensor num_keep, Tensor source, Tensor hole, Tensor count) -> ()"
    ),
    "track_sentences": (
        "(Tensor token_ids, Tensor? hidden, Tensor spans, int num_tokens, Tensor delimiters, bool merge, "
        "Tensor(a!) ends, Tensor(b!) count, Tensor(c!) after_delimiter, Tensor(d!) open_length, "
        "Tensor(e!) open_sum, Tensor(f!) embeddings, Tensor(g!) text) -> ()"
    ),
    "sentence_similarity": (
        "(Tensor embeddings, Tensor slots, Tensor count, Tensor(a!) compared, Tensor(b!) penalties, "
        "float threshold, int rule) -> ()"
    ),
    "held_positions": ("(Tensor sidecar, Tensor table, Tensor num_placed, Tensor num_evicted, int length) -> Tensor"),
    "token_penalties": "(Tensor ends, Tensor penalties, Tensor first, Tensor slots, Tensor positions) -> Tensor",
    "observe_queries": "(Tensor query, Tensor index, Tensor(a!) rows) -> ()",
    "track_thoughts": (
        "(Tensor token_ids, Tensor spans, Tensor vocabulary, Tensor keywords, bool merge, int interval, "
        "Tensor strengths, Tensor(a!) state, int written, Tensor(b!) row, Tensor(c!) coefficient) -> ()"
    ),
    "steer_add": "(Tensor hidden, Tensor coefficient, Tensor row, Tensor vectors) -> Tensor",
}
"""Operator -> signature. `batched.py` defines what each one computes."""


def _fake_score_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    queries: Tensor,
    penalty: Tensor | None,
    pool: int,
    mix: float,
    threshold: float,
) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


def _fake_measure_attention(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    queries: Tensor,
    num_queries: Tensor,
    newest: Tensor,
    output_error: bool,
) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


def _fake_key_similarity(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, num_resident: Tensor, length: int
) -> Tensor:
    shape = (table.shape[0], len(caches), caches[0].shape[1], length)
    return table.new_empty(shape, dtype=torch.float32)


def _fake_select_keep(
    scores: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    num_keep: Tensor,
    pin_below: Tensor,
    pin_from: Tensor,
    max_moves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = positions.shape[:-1]
    moves = positions.new_empty(*rows, max_moves, dtype=torch.int32)
    return moves, torch.empty_like(moves), positions.new_empty(rows, dtype=torch.int32)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_held_positions(
    sidecar: Tensor, table: Tensor, num_placed: Tensor, num_evicted: Tensor, length: int
) -> Tensor:
    layers, _, heads, _ = sidecar.shape
    return sidecar.new_empty(table.shape[0], layers, heads, length)


def _fake_token_penalties(ends: Tensor, penalties: Tensor, first: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


def _fake_steer_add(hidden: Tensor, coefficient: Tensor, row: Tensor, vectors: Tensor) -> Tensor:
    return torch.empty_like(hidden)


FAKES: dict[str, Callable[..., Any]] = {
    "score_tokens": _fake_score_tokens,
    "measure_attention": _fake_measure_attention,
    "key_similarity": _fake_key_similarity,
    "select_keep": _fake_select_keep,
    "compact_pages": _fake_nothing,
    "track_sentences": _fake_nothing,
    "sentence_similarity": _fake_nothing,
    "held_positions": _fake_held_positions,
    "token_penalties": _fake_token_penalties,
    "observe_queries": _fake_nothing,
    "track_thoughts": _fake_nothing,
    "steer_add": _fake_steer_add,
}
