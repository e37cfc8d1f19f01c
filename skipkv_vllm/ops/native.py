"""The C++ and CUDA operators of `csrc/`, which `setup.py` builds into libraries beside this file."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .schema import SCHEMAS

LIBRARIES = {"cpu": "_skipkv_cpu.so", "cuda": "_skipkv_cuda.so"}
"""Device type -> library; it registers `torch.ops.skipkv_<device type>`."""

OVERRIDE = "SKIPKV_NATIVE_CPU"
"""Environment variable with the path of another library for the CPU: an instrumented one, for `make sanitize`."""

REBUILD = "pip install --no-build-isolation -e ."
REMEDIES = {
    "cpu": f"run `{REBUILD}` in a checkout, with g++ installed (Debian/Ubuntu: apt-get install g++)",
    "cuda": f"run `SKIPKV_BUILD_CUDA=1 {REBUILD}` in a checkout, with a CUDA toolkit (nvcc) installed",
}


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why the operators cannot run on a device, and the remedy; None where they can. Loads the library."""
    name = LIBRARIES.get(device_type)
    if name is None:
        return f"has no operators for {device_type}"
    path = Path(__file__).with_name(name)
    if device_type == "cpu" and (other := os.environ.get(OVERRIDE)):
        path = Path(other)
    if not path.exists():
        return f"{path.name} was not built; {REMEDIES[device_type]}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded ({error.__cause__ or error}); {REMEDIES[device_type]}"
    library = getattr(torch.ops, f"skipkv_{device_type}")
    if stale := [op for op, schema in SCHEMAS.items() if not _has(library, op, schema)]:
        return f"{path.name} was built from other sources ({', '.join(stale)} differ); {REMEDIES[device_type]}"
    return None


def _has(library: Any, op: str, schema: str) -> bool:
    if not hasattr(library, op):
        return False
    wanted = torch._C.parse_schema(f"{library.name}::{op}{schema}")
    return str(getattr(library, op).default._schema) == str(wanted)


def _ops(tensor: Tensor) -> Any:
    """The library that serves the device of a tensor."""
    return torch.ops.skipkv_cuda if tensor.is_cuda else torch.ops.skipkv_cpu


def limit_isa(level: int) -> int:
    """Let the CPU operators use no instructions beyond a level: 0 any processor, 1 AVX2, 2 AVX-512; for tests.

    Returns:
        The level in use, which the processor may limit further.
    """
    return torch.ops.skipkv_cpu.limit_isa(level)


def score_scratch(length: int, dim: int, window: int, group: int) -> int:
    """Bytes of scratch memory that a CPU thread of `score_tokens` takes for a request of this length."""
    return torch.ops.skipkv_cpu.score_scratch(length, dim, window, group)


def score_tokens(
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
    """See `batched.score_tokens`."""
    return _ops(positions).score_tokens(
        caches, pointers, layout, table, positions, num_resident, queries, penalty, pool, mix, threshold
    )


def select_keep(
    scores: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    num_keep: Tensor,
    pin_below: Tensor,
    pin_from: Tensor,
    max_moves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `batched.select_keep`."""
    return _ops(positions).select_keep(scores, positions, num_resident, num_keep, pin_below, pin_from, max_moves)


def compact_pages(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    sidecar: Tensor,
    positions: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    num_keep: Tensor,
    source: Tensor,
    hole: Tensor,
    count: Tensor,
) -> None:
    """See `batched.compact_pages`."""
    _ops(positions).compact_pages(
        caches, pointers, layout, sidecar, positions, source_table, target_table, num_keep, source, hole, count
    )


def track_sentences(
    token_ids: Tensor,
    hidden: Tensor | None,
    spans: Tensor,
    num_tokens: int,
    delimiters: Tensor,
    merge: bool,
    ends: Tensor,
    count: Tensor,
    after_delimiter: Tensor,
    open_length: Tensor,
    open_sum: Tensor,
    embeddings: Tensor,
) -> None:
    """See `batched.track_sentences`."""
    state = (ends, count, after_delimiter, open_length, open_sum, embeddings)
    _ops(spans).track_sentences(token_ids, hidden, spans, num_tokens, delimiters, merge, *state)


def sentence_similarity(
    embeddings: Tensor,
    slots: Tensor,
    count: Tensor,
    compared: Tensor,
    penalties: Tensor,
    threshold: float,
    rule: int,
) -> None:
    """See `batched.sentence_similarity`."""
    _ops(embeddings).sentence_similarity(embeddings, slots, count, compared, penalties, threshold, rule)


def observe_queries(query: Tensor, index: Tensor, rows: Tensor) -> None:
    """See `batched.observe_queries`."""
    _ops(query).observe_queries(query, index, rows)


def steer_add(hidden: Tensor, coefficient: Tensor, row: Tensor, vectors: Tensor) -> Tensor:
    """See `batched.steer_add`."""
    return _ops(hidden).steer_add(hidden, coefficient, row, vectors)
