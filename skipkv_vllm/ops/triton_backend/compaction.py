"""The choice of tokens to keep, their moves within the pages, and their positions afterwards."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from .launch import ceil_div, check_pages, common_chunk, kernels, power_of_two, stride_of

SELECT_BLOCK = 2048
"""Slots of a row that `select_keep` reads at a time; the same for every length, so that one kernel is compiled."""


def select_keep(
    scores: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    num_keep: Tensor,
    pin_below: Tensor,
    pin_from: Tensor,
    max_moves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_backend.select_keep`."""
    requests, layers, heads, n = positions.shape
    source = torch.empty(requests, layers, heads, max_moves, dtype=torch.int32, device=positions.device)
    hole = torch.empty_like(source)
    count = torch.empty(requests, layers, heads, dtype=torch.int32, device=positions.device)
    if count.numel() > 0:
        kernels("selection").select_rows[(count.numel(),)](
            *(scores.float().contiguous(), positions.contiguous(), num_resident, num_keep, pin_below, pin_from),
            *(source, hole, count, n, layers * heads, max_moves),
            block=SELECT_BLOCK,
            num_warps=8,
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
    """See `torch_backend.compact_pages`; a page that replaces another must not be a source page of the same request."""
    check_pages(caches, layout)
    if not sidecar.is_contiguous():
        raise KVPolicyError(f"compact_pages: sidecar has strides {sidecar.stride()}; expected a contiguous tensor")
    module, tl = kernels("moves"), import_module("triton.language")
    requests, layers, heads, n = positions.shape
    page_size, pages = caches[0].shape[2], min(source_table.shape[1], target_table.shape[1])
    unit, chunk = _copy_units(caches)
    element = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[unit]
    ratio = caches[0].element_size()
    width = caches[0].shape[3] * ratio // unit
    strides = (
        source_table.stride(0),
        target_table.stride(0),
        sidecar.stride(0),
        *(stride_of(caches[0], dimension) * ratio // (unit * chunk) for dimension in range(3)),
    )
    positions, source, hole = positions.contiguous(), source.contiguous(), hole.contiguous()
    max_moves, block = source.shape[-1], 16
    tables = (pointers, sidecar, positions, source_table, target_table)
    if requests * pages > 0:
        module.copy_pages[(requests * layers * pages,)](
            *(*tables, num_keep, pages, n, layers, heads, *strides),
            page_size=page_size,
            width=width,
            element=element,
            chunk=chunk,
            block=1024,
        )
    if count.numel() * max_moves > 0:
        module.move_cells[(count.numel() * ceil_div(max_moves, block),)](
            *(*tables, source, hole, count.contiguous(), n, max_moves, layers, heads, *strides),
            page_size=page_size,
            width=width,
            element=element,
            chunk=chunk,
            block=block,
            widths=power_of_two(width),
        )


def held_positions(sidecar: Tensor, table: Tensor, num_placed: Tensor, num_evicted: Tensor, length: int) -> Tensor:
    """See `torch_backend.held_positions`."""
    layers, pages, heads, size = sidecar.shape
    out = sidecar.new_empty(table.shape[0], layers, heads, length)
    if not sidecar.is_contiguous():
        raise KVPolicyError(f"held_positions: sidecar has strides {sidecar.stride()}; expected a contiguous tensor")
    if out.numel() > 0:
        kernels("held").read_positions[(ceil_div(out.numel(), 1024),)](
            *(sidecar, table.contiguous(), num_placed.contiguous(), num_evicted.contiguous(), out),
            *(out.numel(), length, layers, heads, pages, table.shape[1]),
            size=size,
            block=1024,
        )
    return out


def _copy_units(caches: list[Tensor]) -> tuple[int, int]:
    """Return the bytes of the widest integer that divides cells and addresses, and how many make up 16 bytes, if so."""
    size, cache = caches[0].element_size(), caches[0]
    strides = (stride_of(cache, dimension) * size for dimension in range(3))
    widest = common_chunk(cache.shape[3] * size, *strides, *(each.data_ptr() for each in caches))
    unit = min(8, widest)
    return unit, widest // unit
