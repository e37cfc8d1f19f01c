"""Tokens in host memory: their way there and back, and what recent queries ask for among them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Cells, ceil_div, cells_of, kernels, power_of_two

BLOCK = 16
"""Tokens that a program copies."""

PART = 1024
"""Tokens that a program of `stored_attention` sums up."""


def key_moments(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    """See `torch_backend.key_moments`."""
    cells = cells_of("key_moments", caches, layout)
    requests, layers, heads = len(table), len(caches), caches[0].shape[1]
    out = torch.empty(2, requests, layers, heads, cells.key_size, dtype=torch.float32, device=table.device)
    kernels("recall").key_moments[(requests * layers * heads,)](
        *(pointers, table.contiguous(), first.contiguous(), end.contiguous(), out),
        *(requests * layers * heads, layers, heads, table.shape[1], *cells.strides),
        **{name: cells.constants[name] for name in ("page_size", "dim", "dims", "element", "chunk")},
        block=64,
    )
    return out


def store_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    spans: Tensor,
    stored_table: Tensor,
    centre: Tensor,
    spread: Tensor,
    stored: Tensor,
    signs: Tensor,
    sizes: Tensor,
) -> None:
    """See `torch_backend.store_tokens`; no request has more tokens in its span than its table has room for."""
    cells = cells_of("store_tokens", caches, layout)
    requests, layers, heads = len(spans), len(caches), caches[0].shape[1]
    longest = table.shape[1] * caches[0].shape[2]
    kernels("recall").store_rows[(requests * layers * heads, ceil_div(longest, BLOCK))](
        *(pointers, table.contiguous(), spans.contiguous(), stored_table.contiguous()),
        *(centre.contiguous(), spread.contiguous(), _bits(stored), signs, sizes),
        *(layers, heads, table.shape[1], stored_table.shape[1], *cells.strides),
        **_constants(cells, stored),
        block=BLOCK,
    )


def recall_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    sidecar: Tensor,
    table: Tensor,
    slots: Tensor,
    places: Tensor,
    first_position: Tensor,
    stored_table: Tensor,
    stored: Tensor,
) -> None:
    """See `torch_backend.recall_tokens`."""
    cells = cells_of("recall_tokens", caches, layout)
    requests, layers, heads, number = places.shape
    kernels("recall").recall_rows[(requests * layers * heads, ceil_div(number, BLOCK))](
        *(pointers, sidecar, table.contiguous(), slots.contiguous(), places.contiguous()),
        *(first_position.contiguous(), stored_table.contiguous(), _bits(stored)),
        *(layers, heads, number, table.shape[1], stored_table.shape[1], sidecar.stride(0), *cells.strides),
        **_constants(cells, stored),
        block=BLOCK,
    )


def stored_attention(
    signs: Tensor, sizes: Tensor, stored_table: Tensor, number: Tensor, queries: Tensor, length: int
) -> Tensor:
    """See `torch_backend.stored_attention`."""
    _, layers, heads, stored_size, width = signs.shape
    requests, dim = len(number), 8 * width
    out = torch.empty(requests, layers, heads, length, dtype=torch.float32, device=signs.device)
    if out.numel() == 0:
        return out
    window, in_group = queries.shape[2], queries.shape[3] // heads
    group = power_of_two(in_group)
    padded = max(power_of_two(window), 16 // group)
    rows = padded * group
    # [R, L, H, W, G, D], and padding behind the queries and the heads of a group.
    grouped = queries.float().unflatten(3, (heads, in_group)).permute(0, 1, 3, 2, 4, 5) / math.sqrt(dim)
    grouped = F.pad(grouped, (0, 0, 0, group - in_group, 0, padded - window)).contiguous()
    parts, programs = ceil_div(length, PART), requests * layers * heads
    largest = torch.empty(programs, parts, rows, dtype=torch.float32, device=signs.device)
    total = torch.empty_like(largest)
    block = 64 if rows <= 64 and dim <= 128 else 32
    sizes_of = {"stored_size": stored_size, "dim": dim, "dims": max(16, power_of_two(dim))}
    inputs = (signs, sizes, stored_table.contiguous(), number.contiguous(), grouped)
    kernels("recall").sum_weights[(programs, parts)](
        *(*inputs, largest, total, layers, heads, parts, stored_table.shape[1]),
        **sizes_of,
        rows=rows,
        part=PART,
        block=block,
    )
    normaliser = (largest + total.log()).logsumexp(1)
    # Neither padded queries nor padded heads may have a weight.
    is_real = torch.zeros(padded, group, dtype=torch.bool, device=signs.device)
    is_real[:window, :in_group] = True
    normaliser.masked_fill_(~is_real.flatten(), torch.inf)
    kernels("recall").best_weights[(programs, ceil_div(length, block))](
        *(*inputs, normaliser, out, layers, heads, length, stored_table.shape[1]),
        **sizes_of,
        window=padded,
        group=group,
        in_group=in_group,
        block=block,
    )
    return out


def _bits(stored: Tensor) -> Tensor:
    """View elements of 8 bits as integers, because compilers for older GPUs refuse their types."""
    return stored.view(torch.uint8) if stored.element_size() == 1 else stored


def _constants(cells: Cells, stored: Tensor) -> dict[str, Any]:
    constants = {name: cells.constants[name] for name in ("page_size", "dim", "dims", "element", "chunk")}
    return constants | {"stored_size": stored.shape[3]}
