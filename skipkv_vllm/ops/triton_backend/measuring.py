"""Measurements of resident tokens that methods build their scores from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..clusters import MOST_CLUSTERS, ROUNDS, TIE
from .launch import SCRATCH_BYTES, by_position, ceil_div, cells_of, kernels


def vector_norms(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    values: bool,
    norm: int,
    part: int,
    weights: Tensor | None,
) -> Tensor:
    """See `torch_backend.vector_norms`; caches as for `score_tokens`."""
    cells = cells_of("vector_norms", caches, layout)
    layers, heads = len(caches), caches[0].shape[1]
    n, rows = positions.shape[-1], positions.shape[:-1].numel()
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    # The order matters only where a row has several centres.
    ordered = 0 < part < n
    block = cells.block(64, 32, latents=16)
    at_once = min(rows, max(1, SCRATCH_BYTES // (24 * n))) if ordered else rows
    places = positions.contiguous().view(rows, n)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        order = by_position(places[first : first + count], num_resident, first, layers * heads) if ordered else places
        own_part = min(part or 4 * block, n)
        cells.kernels("measuring").measure_vectors[(count * ceil_div(n, own_part),)](
            *(pointers, table, num_resident, order, out if weights is None else weights.float().contiguous(), out),
            *(first, n, own_part, layers, heads, table.stride(0), *cells.strides),
            skip=cells.value_size if values else 0,
            norm=norm,
            centred=part > 0,
            ordered=ordered,
            weighted=weights is not None,
            block=block,
            **cells.constants,
        )
    return out


def pool_neighbours(scores: Tensor, positions: Tensor, num_resident: Tensor, window: int, pool: int) -> Tensor:
    """See `torch_backend.pool_neighbours`."""
    n, rows, each = positions.shape[-1], positions.shape[:-1].numel(), positions.shape[1:-1].numel()
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel() == 0:
        return out
    block, at_once = 1024, max(1, SCRATCH_BYTES // (24 * n))
    places, scores = positions.contiguous().view(rows, n), scores.float().contiguous()
    for first in range(0, rows, at_once):
        order = by_position(places[first : first + at_once], num_resident, first, each)
        kernels("measuring").pool_ranks[(len(order) * ceil_div(n, block),)](
            *(scores, num_resident, order, out, first, n, each, window), pool=pool, block=block
        )
    return out


def central_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    begin: Tensor,
    end: Tensor,
    quota: Tensor,
    longest: int,
) -> Tensor:
    """See `torch_backend.central_tokens`; caches as for `score_tokens`."""
    cells = cells_of("central_tokens", caches, layout)
    layers, heads, segments = len(caches), caches[0].shape[1], quota.shape[1]
    n, rows = positions.shape[-1], positions.shape[:-1].numel()
    out = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    if out.numel() == 0 or segments == 0:
        return out
    dims = cells.key_size if cells.has_latents else cells.constants["dims"]
    at_once = min(rows, max(1, SCRATCH_BYTES // (32 * n + 4 * segments * MOST_CLUSTERS * dims)))
    places = positions.contiguous().view(rows, n)
    centroids = torch.empty(at_once * segments, MOST_CLUSTERS, dims, dtype=torch.float32, device=out.device)
    assigned, distance = (
        torch.empty(at_once, n, dtype=dtype, device=out.device) for dtype in (torch.int32, torch.float32)
    )
    for first in range(0, rows, at_once):
        order = by_position(places[first : first + at_once], num_resident, first, layers * heads)
        cells.kernels("measuring").choose_central[(len(order) * segments,)](
            *(pointers, table, places, num_resident, begin, end, quota.contiguous(), order),
            *(centroids, assigned, distance, out.view(torch.int8), first, n, segments, longest, layers, heads),
            *(table.stride(0), *cells.strides, (1 + TIE) ** 2),
            most=MOST_CLUSTERS,
            rounds=ROUNDS,
            block=cells.block(32, 16, latents=16),
            num_warps=8,
            **cells.constants,
        )
    return out
