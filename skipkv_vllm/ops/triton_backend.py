"""The operators in Triton, for NVIDIA and AMD GPUs; `batched.py` says what each one computes.

Nothing here waits for the device: grids follow from shapes, lengths are read by the kernels. On a CPU the kernels run
in Triton's interpreter, for tests. Only GPU pages (`Layout.ROWS`) are known.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..core.errors import KVPolicyError
from .paging import Layout
from .torch_backend import RULES

SCRATCH_BYTES = 256 << 20
"""Scratch memory that scoring may take; more rows are scored one part after the other."""

MAX_SELECT_BLOCK = 4096
"""Slots of a row that `select_keep` holds in registers; longer rows are read in several blocks."""


def unavailable(device_type: str) -> str | None:
    """Why the operators cannot run on a device, and the remedy."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if device_type == "cpu" and not _interpreted():
        return "Triton needs a GPU; to test its kernels on a CPU set TRITON_INTERPRET=1"
    return None


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
    """See `batched.score_tokens`; caches in float32, float16, bfloat16, float8_e4m3fn or float8_e5m2."""
    _check_pages(caches, layout)
    kernels, tl, cache = _kernels("scoring"), import_module("triton.language"), caches[0]
    element = _element("score_tokens", cache, queries)
    is_narrow = cache.element_size() == 1
    layers, heads, page_size = len(caches), *cache.shape[1:3]
    window, q_heads, dim = queries.shape[2:]
    n, rows = positions.shape[-1], positions.shape[:-1].numel()
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    queries, positions = queries.contiguous(), positions.contiguous()
    penalty = None if penalty is None else penalty.float().contiguous()

    # NumPy has no bfloat16, so the interpreter multiplies in float32.
    multiply = tl.float32 if _interpreted() else tl.float16 if is_narrow else element
    dims, windows = max(16, _power_of_two(dim)), _power_of_two(window)
    block = 64 if dims <= 128 else 32
    blocks = _ceil_div(n, block)
    wide = min(_power_of_two(n), max(64, 8192 // windows))
    redundancy = mix != 1.0
    strides = cache.stride()[:3]
    past = torch.arange(n, device=positions.device) >= num_resident[:, None]
    at_once = max(1, SCRATCH_BYTES // (n * (64 + 4 * window) + 4 * blocks * dim))

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=positions.device)

    for first in range(0, rows, at_once):
        part = min(at_once, rows - first)
        request = torch.arange(first, first + part, device=positions.device) // (layers * heads)
        ahead = positions.view(rows, n)[first : first + part].masked_fill(past[request], torch.iinfo(torch.int32).max)
        order = ahead.argsort(dim=-1).int()
        cells, inverse = scratch(part, n, dtype=torch.int32), scratch(part, n)
        partial, logits = scratch(part, blocks, dim), scratch(part, window, n)
        attention, mean, normaliser = scratch(part, n), scratch(part, n), scratch(part)
        grid = (part * blocks,)
        kernels.measure_keys[grid](
            *(pointers, table, order, num_resident, queries, cells, inverse, partial, logits),
            *(first, n, layers, heads, table.stride(0), *strides, float(dim**0.5)),
            page_size=page_size,
            dim=dim,
            window=window,
            group=q_heads // heads,
            element=element,
            multiply=tl.float32 if is_narrow else multiply,  # the queries are float32 then
            block=block,
            dims=dims,
            windows=max(16, windows),
        )
        if redundancy:
            shape = {"page_size": page_size, "dim": dim, "element": element, "block": block, "dims": dims}
            exempted = torch.zeros(part, n, dtype=torch.int64, device=positions.device)
            kernels.exempt_last_similar[grid](
                *(pointers, num_resident, cells, inverse, exempted),
                *(first, n, layers, heads, *strides, threshold),
                multiply=multiply,
                **shape,
            )
            kernels.mean_cosine[grid](
                *(pointers, num_resident, cells, inverse, partial.sum(dim=1), exempted, mean),
                *(first, n, layers, heads, *strides),
                **shape,
            )
        kernels.attend[(part,)](
            *(num_resident, logits, mean, attention, normaliser, first, n, layers, heads),
            window=window,
            redundancy=redundancy,
            block=wide,
            windows=windows,
        )
        lines = slice(first, first + part)
        kernels.combine[(part * _ceil_div(n, 256),)](
            *(num_resident, order, attention, mean, normaliser),
            *(mean if penalty is None else penalty.view(rows, n)[lines], out.view(rows, n)[lines]),
            *(first, n, layers, heads, mix),
            window=window,
            pool=pool,
            redundancy=redundancy,
            penalised=penalty is not None,
            block=256,
        )
    return out


def measure_attention(
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
    """See `batched.measure_attention`; caches as for `score_tokens`."""
    _check_pages(caches, layout)
    kernels, tl, cache = _kernels("attention"), import_module("triton.language"), caches[0]
    element = _element("measure_attention", cache, queries)
    layers, kv_heads = len(caches), cache.shape[1]
    window, q_heads, dim = queries.shape[2:]
    n, rows, heads = positions.shape[-1], positions.shape[:-1].numel(), window * (q_heads // kv_heads)
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    inputs = (pointers, table, positions.contiguous(), num_resident, num_queries, newest, queries.contiguous())
    shape = {
        "page_size": cache.shape[2],
        "dim": dim,
        "window": window,
        "group": q_heads // kv_heads,
        "element": element,
        # NumPy has no bfloat16, and queries for keys of 8 bits are float32.
        "multiply": tl.float32 if _interpreted() or cache.element_size() == 1 else element,
        "errors": output_error,
        "block": 64 if dim <= 128 else 16,
        "dims": max(16, _power_of_two(dim)),
        "tile": 16,
    }
    width = dim if output_error else 0
    at_once = min(rows, max(1, SCRATCH_BYTES // max(1, 4 * heads * (width + 3))))
    top, share, squares = torch.empty(3, at_once, heads, dtype=torch.float32, device=out.device)
    scratch = (top, share, squares, torch.empty(at_once, heads, width, dtype=torch.float32, device=out.device))
    for first in range(0, rows, at_once):
        part = min(at_once, rows - first)
        numbers = (first, n, layers, kv_heads, table.stride(0), *cache.stride()[:3], float(dim**0.5))
        kernels.attend_queries[(part * _ceil_div(heads, 16),)](*inputs, *scratch, *numbers, **shape)
        kernels.sum_queries[(part * _ceil_div(n, shape["block"]),)](*inputs, *scratch, out, *numbers, **shape)
    return out


def key_similarity(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, num_resident: Tensor, length: int
) -> Tensor:
    """See `batched.key_similarity`; caches as for `score_tokens`."""
    _check_pages(caches, layout)
    cache, layers = caches[0], len(caches)
    _, heads, page_size, double = cache.shape
    out = torch.empty(table.shape[0], layers, heads, length, dtype=torch.float32, device=table.device)
    if out.numel() > 0:
        _kernels("attention").compare_keys[(table.shape[0] * layers * heads,)](
            *(pointers, table, num_resident, out, length, layers, heads, table.stride(0), *cache.stride()[:3]),
            page_size=page_size,
            dim=double // 2,
            element=_element("key_similarity", cache),
            block=64 if double <= 256 else 32,
            dims=max(16, _power_of_two(double // 2)),
        )
    return out


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
    requests, layers, heads, n = positions.shape
    source = torch.empty(requests, layers, heads, max_moves, dtype=torch.int32, device=positions.device)
    hole = torch.empty_like(source)
    count = torch.empty(requests, layers, heads, dtype=torch.int32, device=positions.device)
    if count.numel() > 0:
        block = min(MAX_SELECT_BLOCK, _power_of_two(n))
        _kernels("selection").select_rows[(count.numel(),)](
            *(scores.float().contiguous(), positions.contiguous(), num_resident, num_keep, pin_below, pin_from),
            *(source, hole, count, n, layers * heads, max_moves),
            block=block,
            num_warps=8 if block > 1024 else 4,
        )
    return source, hole, count


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
    """See `batched.compact_pages`; a page that replaces another must not be a source page of the same request."""
    _check_pages(caches, layout)
    if not sidecar.is_contiguous():
        raise KVPolicyError(f"compact_pages: sidecar has strides {sidecar.stride()}; expected a contiguous tensor")
    kernels, tl = _kernels("moves"), import_module("triton.language")
    requests, layers, heads, n = positions.shape
    page_size, pages = caches[0].shape[2], min(source_table.shape[1], target_table.shape[1])
    unit = _copy_unit(caches)
    element = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[unit]
    ratio = caches[0].element_size()
    width = caches[0].shape[3] * ratio // unit
    strides = (
        source_table.stride(0),
        target_table.stride(0),
        sidecar.stride(0),
        *(stride * ratio // unit for stride in caches[0].stride()[:3]),
    )
    positions, source, hole = positions.contiguous(), source.contiguous(), hole.contiguous()
    max_moves, block = source.shape[-1], 16
    tables = (pointers, sidecar, positions, source_table, target_table)
    if requests * pages > 0:
        kernels.copy_pages[(requests * layers * pages,)](
            *(*tables, num_keep, pages, n, layers, heads, *strides),
            page_size=page_size,
            width=width,
            element=element,
            block=1024,
        )
    if count.numel() * max_moves > 0:
        kernels.move_cells[(count.numel() * _ceil_div(max_moves, block),)](
            *(*tables, source, hole, count.contiguous(), n, max_moves, layers, heads, *strides),
            page_size=page_size,
            width=width,
            element=element,
            block=block,
            widths=_power_of_two(width),
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
    text: Tensor,
) -> None:
    """See `batched.track_sentences`."""
    requests, held = spans.shape[1], embeddings.shape[1] - 1
    if requests == 0:
        return
    states = (ends[0], text, open_sum, embeddings) if hidden is not None else (ends[0], text)
    if not all(state.is_contiguous() for state in states):
        raise KVPolicyError("track_sentences: rows of ends, text, open_sum and embeddings must be contiguous")
    if hidden is not None and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    width = 1 if hidden is None else hidden.shape[1]
    _kernels("sentences").track[(requests,)](
        *(token_ids, open_sum if hidden is None else hidden, spans.contiguous(), delimiters.view(torch.int8)),
        *(ends, count, after_delimiter.view(torch.int8), open_length, open_sum, embeddings, text),
        *(requests, 0 if hidden is None else hidden.stride(0), ends.stride(0), held, text.shape[1]),
        width=width,
        merge=int(merge),
        embeds=hidden is not None,
        keeps_text=text.shape[1] > 0,
        tokens=64,
        block=min(1024, _power_of_two(width)),
    )


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
    held, hidden, block = embeddings.shape[1] - 1, embeddings.shape[2], 32
    if embeddings.stride(2) != 1 or penalties.stride(1) != 1:
        raise KVPolicyError(
            f"sentence_similarity: embeddings have strides {embeddings.stride()} and penalties {penalties.stride()}; "
            "expected a contiguous last dimension"
        )
    if slots.numel() * held > 0:
        strides = (*embeddings.stride()[:2], penalties.stride(0))
        _kernels("sentences").compare_sentences[(slots.numel() * _ceil_div(held, block),)](
            *(embeddings, slots, count, compared, penalties, held, hidden, *strides, threshold),
            latest=RULES[rule] == "last",
            block=block,
            columns=16,
            chunk=min(64, max(16, _power_of_two(hidden))),
        )
    # Only now: every program of a request reads where the last call stopped.
    compared.index_copy_(0, slots, count.index_select(0, slots))


def held_positions(sidecar: Tensor, table: Tensor, num_placed: Tensor, num_evicted: Tensor, length: int) -> Tensor:
    """See `batched.held_positions`."""
    layers, pages, heads, size = sidecar.shape
    out = sidecar.new_empty(table.shape[0], layers, heads, length)
    if not sidecar.is_contiguous():
        raise KVPolicyError(f"held_positions: sidecar has strides {sidecar.stride()}; expected a contiguous tensor")
    if out.numel() > 0:
        _kernels("held").read_positions[(_ceil_div(out.numel(), 1024),)](
            *(sidecar, table.contiguous(), num_placed.contiguous(), num_evicted.contiguous(), out),
            *(out.numel(), length, layers, heads, pages, table.shape[1]),
            size=size,
            block=1024,
        )
    return out


def token_penalties(ends: Tensor, penalties: Tensor, first: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """See `batched.token_penalties`."""
    positions = positions.contiguous()
    out = torch.empty_like(positions, dtype=torch.float32)
    most = ends.shape[1]
    if ends.stride(1) != 1 or penalties.stride(1) != 1:
        raise KVPolicyError(
            f"token_penalties: ends have strides {ends.stride()} and penalties {penalties.stride()}; "
            "expected a contiguous last dimension"
        )
    if out.numel() > 0:
        _kernels("held").look_up_penalties[(_ceil_div(out.numel(), 1024),)](
            *(ends, penalties, first.contiguous(), slots.contiguous(), positions, out),
            *(out.numel(), positions[0].numel(), most, ends.stride(0), penalties.stride(0)),
            halvings=(most - 1).bit_length(),
            block=1024,
        )
    return out


def track_thoughts(
    token_ids: Tensor,
    spans: Tensor,
    vocabulary: Tensor,
    keywords: Tensor,
    merge: bool,
    interval: int,
    strengths: Tensor,
    state: Tensor,
    written: int,
    row: Tensor,
    coefficient: Tensor,
) -> None:
    """See `batched.track_thoughts`."""
    requests, columns = spans.shape[1], state.shape[1]
    if not all(t.is_contiguous() for t in (vocabulary, keywords, strengths, state)):
        raise KVPolicyError("track_thoughts: vocabulary, keywords, strengths and state must be contiguous")
    row[:written] = 0
    if requests > 0:
        _kernels("thoughts").track[(requests,)](
            *(token_ids, spans.contiguous(), vocabulary, keywords, strengths, state, row, coefficient),
            *(requests, keywords.shape[1], interval),
            merge=int(merge),
            columns=columns,
        )


def record_queries(query: Tensor, index: Tensor, rows: Tensor) -> None:
    """See `batched.record_queries`."""
    tokens, heads, dim = query.shape
    if tokens == 0:
        return
    if not rows[0].is_contiguous() or rows.dtype != query.dtype:
        raise KVPolicyError(
            f"record_queries: query {query.dtype} and rows {rows.dtype} with strides {rows.stride()}; expected one "
            "dtype and contiguous rows"
        )
    if query.stride(2) != 1:
        query = query.contiguous()
    size = heads * dim
    block = min(1024, _power_of_two(size))
    _kernels("tokens").copy_queries[(tokens, _ceil_div(size, block))](
        *(query, index, rows, query.stride(0), query.stride(1), rows.stride(0)), dim=dim, size=size, block=block
    )


def steer_add(hidden: Tensor, coefficient: Tensor, row: Tensor, vectors: Tensor) -> Tensor:
    """See `batched.steer_add`."""
    tokens, size = hidden.shape
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    out = torch.empty(tokens, size, dtype=hidden.dtype, device=hidden.device)
    if tokens > 0:
        block = min(1024, _power_of_two(size))
        _kernels("tokens").add_steering[(tokens, _ceil_div(size, block))](
            *(hidden, coefficient, row, vectors, out, hidden.stride(0), vectors.stride(0), out.stride(0)),
            size=size,
            block=block,
        )
    return out


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels(name: str) -> Any:
    """A module of kernels; only here, so that this module can be imported where Triton cannot."""
    return import_module(f".triton_kernels.{name}", __package__)


def _element(op: str, cache: Tensor, queries: Tensor | None = None) -> Any:
    """Triton's type for the elements of a cache, whose dtype and that of the queries are checked."""
    tl = import_module("triton.language")
    narrow = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
    elements = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} | narrow
    asked = torch.float32 if cache.dtype in narrow else cache.dtype
    if cache.dtype not in elements or (queries is not None and queries.dtype != asked):
        raise KVPolicyError(
            f"{op}: caches {cache.dtype} and queries {queries.dtype if queries is not None else None}; expected one of "
            "float32, float16 and bfloat16 for both, or float8_e4m3fn or float8_e5m2 and float32; start without "
            "--kv-cache-dtype"
        )
    return elements[cache.dtype]


def _check_pages(caches: list[Tensor], layout: int) -> None:
    if layout != Layout.ROWS or caches[0].stride(3) != 1:
        raise KVPolicyError(
            f"the Triton operators read pages with K and V side by side (layout {Layout.ROWS.value}); got layout "
            f"{layout} with strides {caches[0].stride()}; set SKIPKV_OPS=reference"
        )


def _copy_unit(caches: list[Tensor]) -> int:
    """Bytes of the widest integer, at most 8, that cells and addresses are multiples of."""
    size, (*strides, _) = caches[0].element_size(), caches[0].stride()
    lengths = [caches[0].shape[3] * size, *(stride * size for stride in strides), *(c.data_ptr() for c in caches)]
    return next(unit for unit in (8, 4, 2, 1) if all(length % unit == 0 for length in lengths))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
