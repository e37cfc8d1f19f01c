"""Scores of resident tokens, and the queries that they are computed from."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from ..effects import Effect
from .launch import (
    SCRATCH_BYTES,
    Cells,
    by_position,
    ceil_div,
    cells_of,
    common_chunk,
    element_of,
    interpreted,
    kernels,
    power_of_two,
    stride_of,
)


def record_queries(query: Tensor, index: Tensor, ring: Tensor, scale: Tensor | None) -> None:
    """See `torch_backend.record_queries`."""
    tokens, heads, dim = query.shape
    if tokens == 0:
        return
    narrow = query.dtype.itemsize == 1
    if not ring[0].is_contiguous() or narrow != (scale is not None) or not (narrow or ring.dtype == query.dtype):
        raise KVPolicyError(
            f"record_queries: query {query.dtype} and ring {ring.dtype} with strides {ring.stride()}; expected "
            "contiguous rows, and one dtype, or queries of 8 bits with their scale"
        )
    if scale is not None and (scale.numel() == 0 or heads % scale.numel()):
        raise KVPolicyError(f"record_queries: {heads} query heads do not share {scale.numel()} scales")
    element = element_of("record_queries", query)
    if query.stride(2) != 1:
        query = query.contiguous()
    size, strides = heads * dim, (stride_of(query, 0), stride_of(query, 1), stride_of(ring, 0))
    block, chunk = min(1024, power_of_two(size)), common_chunk(dim, *strides)
    kernels("tokens").copy_queries[(tokens, ceil_div(size, block))](
        # Compilers for older GPUs refuse types of 8 bits.
        *(query.view(torch.uint8) if narrow else query, index, ring, index if scale is None else scale.contiguous()),
        *(ring.shape[0] - 1, *(stride // chunk for stride in strides)),
        element=element,
        scaled=0 if scale is None else size // scale.numel(),
        chunk=chunk,
        dim=dim,
        size=size,
        block=block,
    )


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
    """See `torch_backend.score_tokens`; caches in float32, float16, bfloat16, float8_e4m3fn or float8_e5m2."""
    cells = cells_of("score_tokens", caches, layout, queries)
    cache, n, rows = caches[0], positions.shape[-1], positions.shape[:-1].numel()
    window, dim = queries.shape[2], queries.shape[4]
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    block = cells.block(64, 32, latents=64)
    call = _Scoring(
        pointers,
        table,
        positions.contiguous().view(rows, n),
        num_resident,
        queries.contiguous(),
        None if penalty is None else penalty.float().contiguous().view(rows, n),
        out.view(rows, n),
        (len(caches), cache.shape[1]),
        cells,
        cells.constants | {"block": block},
        cache.element_size() == 1,
    )
    at_once = max(1, SCRATCH_BYTES // (n * (64 + 4 * window) + 4 * ceil_div(n, block) * dim))
    for first in range(0, rows, at_once):
        _score_rows(call, first, min(at_once, rows - first), pool, mix, threshold)
    return out


class _Scoring(NamedTuple):
    """The tensors of `score_tokens`, and the constants of the kernels that read keys.

    Attributes:
        positions, penalty, out: `[rows, n]`.
        heads: layers and kv heads.
        cells: of the caches.
        keys: constants of every kernel that reads keys.
        is_narrow: whether keys have 8 bits.
    """

    pointers: Tensor
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    queries: Tensor
    penalty: Tensor | None
    out: Tensor
    heads: tuple[int, int]
    cells: Cells
    keys: dict[str, Any]
    is_narrow: bool


def _score_rows(call: _Scoring, first: int, part: int, pool: int, mix: float, threshold: float) -> None:
    """Score `part` rows from `first` on."""
    module, tl, device = call.cells.kernels("scoring"), import_module("triton.language"), call.positions.device
    n, (layers, heads), (window, q_heads, dim) = call.positions.shape[1], call.heads, call.queries.shape[2:]
    windows, blocks, redundancy = power_of_two(window), ceil_div(n, call.keys["block"]), mix != 1.0
    # NumPy has no bfloat16, so the interpreter multiplies in float32.
    multiply = tl.float32 if interpreted() else tl.float16 if call.is_narrow else call.keys["element"]

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    order = by_position(call.positions[first : first + part], call.num_resident, first, layers * heads)
    numbers = (first, n, layers, heads)
    cells, inverse = scratch(part, n, dtype=torch.int32), scratch(part, n)
    partial, logits = scratch(part, blocks, dim), scratch(part, window, n)
    attention, mean, normaliser = scratch(part, n), scratch(part, n), scratch(part)
    grid = (part * blocks,)
    module.measure_keys[grid](
        *(call.pointers, call.table, order, call.num_resident, call.queries, cells, inverse, partial, logits),
        *(*numbers, call.table.stride(0), *call.cells.strides, float(dim**0.5)),
        window=window,
        group=q_heads // heads,
        multiply=tl.float32 if call.is_narrow else multiply,  # the queries are float32 then
        windows=windows if call.cells.has_latents else max(16, windows),
        **call.keys,
    )
    if redundancy:
        exempted = torch.zeros(part, n, dtype=torch.int64, device=device)
        # Products of float32 are not those of tensor cores: a thread holds all that it multiplies in registers.
        own = 16 if multiply == tl.float32 else call.keys["block"]
        module.exempt_last_similar[(part * ceil_div(n, own),)](
            *(call.pointers, call.num_resident, cells, inverse, exempted, *numbers, *call.cells.strides, threshold),
            multiply=multiply,
            num_warps=8,
            **(call.keys | {"block": own}),
        )
        module.mean_cosine[grid](
            *(call.pointers, call.num_resident, cells, inverse, partial.sum(dim=1), exempted, mean),
            *(*numbers, *call.cells.strides),
            **call.keys,
        )
    kernels("scoring").attend[(part,)](
        *(call.num_resident, logits, mean, attention, normaliser, *numbers),
        window=window,
        redundancy=redundancy,
        block=max(64, 8192 // windows),
        windows=windows,
    )
    lines = slice(first, first + part)
    kernels("scoring").combine[(part * ceil_div(n, 256),)](
        *(call.num_resident, order, attention, mean, normaliser),
        *(mean if call.penalty is None else call.penalty[lines], call.out[lines], *numbers, mix),
        window=window,
        pool=pool,
        redundancy=redundancy,
        penalised=call.penalty is not None,
        block=256,
    )


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
    sinks: Tensor | None,
    effect: int,
    negligible: float,
) -> Tensor:
    """See `torch_backend.measure_attention`; caches as for `score_tokens`."""
    cells = cells_of("measure_attention", caches, layout, queries)
    module, tl, cache = cells.kernels("attention"), import_module("triton.language"), caches[0]
    layers, kv_heads = len(caches), cache.shape[1]
    window, q_heads, dim = queries.shape[2:]
    n, rows, heads = positions.shape[-1], positions.shape[:-1].numel(), window * (q_heads // kv_heads)
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    inputs = (pointers, table, positions.contiguous(), num_resident, num_queries, newest, queries.contiguous())
    shape = {
        "window": window,
        "group": q_heads // kv_heads,
        # NumPy has no bfloat16, and queries for keys of 8 bits are float32.
        "multiply": tl.float32 if interpreted() or cache.element_size() == 1 else cells.constants["element"],
        "effect": int(effect),
        "valued": Effect.OUTPUT <= effect <= Effect.JOINT,
        "errors": effect in (Effect.OUTPUT, Effect.KEY, Effect.JOINT),
        **cells.constants,
    }
    width = cells.value_size if shape["errors"] else 0
    at_once = min(rows, max(1, SCRATCH_BYTES // max(1, 4 * heads * (width + 3))))
    top, share, squares = torch.empty(3, at_once, heads, dtype=torch.float32, device=out.device)
    scratch = (top, share, squares, torch.empty(at_once, heads, width, dtype=torch.float32, device=out.device))
    log_negligible = math.log(negligible) if effect == Effect.NEGLIGIBLE else 0.0
    attending, summing = _tiles(cells, shape["errors"])
    for first in range(0, rows, at_once):
        part = min(at_once, rows - first)
        numbers = (first, n, layers, kv_heads, table.stride(0), *cells.strides, float(dim**0.5))
        module.attend_queries[(part * ceil_div(heads, attending["tile"]),)](
            *(*inputs, out if sinks is None else sinks.contiguous(), *scratch, *numbers),
            sunk=sinks is not None,
            **attending,
            **shape,
        )
        module.sum_queries[(part * ceil_div(n, summing["block"]),)](
            *(*inputs, *scratch, out, *numbers, log_negligible), **summing, **shape
        )
    return out


def _tiles(cells: Cells, errors: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of the tiles of both passes of `measure_attention`; `errors`: whether it computes outputs."""
    if not cells.has_latents:
        return {"block": cells.block(32, 16, latents=0), "tile": 16, "num_stages": 1}, {
            "block": cells.block(64, 16, latents=0),
            "tile": 16,
        }
    # A tile of outputs has as many columns as a latent has features.
    tile = 32 if errors else 64
    return {"block": tile, "tile": tile, "num_warps": 8}, {"block": 64, "tile": 64, "num_warps": 8}


def key_similarity(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, num_resident: Tensor, length: int
) -> Tensor:
    """See `torch_backend.key_similarity`; caches as for `score_tokens`."""
    cells = cells_of("key_similarity", caches, layout)
    layers, heads = len(caches), caches[0].shape[1]
    out = torch.empty(table.shape[0], layers, heads, length, dtype=torch.float32, device=table.device)
    if out.numel() > 0:
        cells.kernels("attention").compare_keys[(table.shape[0] * layers * heads,)](
            *(pointers, table, num_resident, out, length, layers, heads, table.stride(0), *cells.strides),
            block=cells.block(64, 32, latents=16),
            num_warps=8 if cells.has_latents else 4,
            **cells.constants,
        )
    return out
