# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`score_tokens` of latents: the kernels that read keys; see `scoring`, whose kernels have the same arguments."""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel
from .latents import latents_at, load_part, products
from .rows import EPSILON, cells_of, row_of
from .scoring import FIXED


@kernel("queries", "partial")
def measure_keys(
    pointers,
    table,
    order,
    num_resident,
    queries,
    cells,
    inverse,
    partial,
    logits,
    first,
    n,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    root,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    multiply: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
    windows: tl.constexpr,
):
    """See `scoring.measure_keys`; several query heads are multiplied at once, because all of them share the key."""
    tile: tl.constexpr = max(64, windows)
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    b = tl.program_id(0) % blocks
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    rank = b * block + tl.arange(0, block)
    valid = rank < length
    line = row.to(tl.int64) * n
    d = tl.arange(0, width)
    sums = partial + (row.to(tl.int64) * blocks + b) * dim + d
    if b * block >= length:
        for begin in range(0, dim, width):
            tl.store(sums + begin, tl.zeros([width], tl.float32))
        return
    slot = tl.load(order + line + rank, mask=valid, other=0)
    cell = cells_of(table + request.to(tl.int64) * table_stride, slot, valid, page_size)
    tl.store(cells + line + rank, cell, mask=valid)
    at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
    squares = tl.zeros([block], tl.float32)
    for begin in range(0, dim, width):
        key = load_part(at, valid, begin, element, width).to(tl.float32)
        squares += tl.sum(key * key, axis=1)
    scale = 1.0 / (tl.sqrt(squares) + EPSILON)
    tl.store(inverse + line + rank, scale, mask=valid)
    for begin in range(0, dim, width):
        key = load_part(at, valid, begin, element, width).to(tl.float32)
        tl.store(sums + begin, tl.sum(key * scale[:, None], axis=0))

    # A line of a tile is a query of the window and one of its heads; a maximum over the heads remains.
    w = tl.arange(0, tile) % windows
    of_tile = tl.arange(0, tile) // windows
    of_row = ((request * layers + layer).to(tl.int64) * window * heads + head) * group
    best = tl.full([windows, block], -float("inf"), tl.float32)
    for g in range(0, group, tile // windows):
        own = g + of_tile
        counts = (w < window) & (own < group)
        query = queries + (of_row + w * (heads * group) + own) * dim
        product = products(query, counts, at, valid, dim, element, multiply, width, tile, block)
        product = tl.where(counts[:, None], product, -float("inf"))
        best = tl.maximum(best, tl.max(tl.reshape(product, [tile // windows, windows, block]), axis=0))
    v = tl.arange(0, windows)
    kept = (v < window)[:, None] & (rank < length - window)[None, :]
    tl.store(logits + line * window + v[:, None].to(tl.int64) * n + rank[None, :], best / root, mask=kept)


@kernel()
def exempt_last_similar(
    pointers,
    num_resident,
    cells,
    inverse,
    exempted,
    first,
    n,
    layers,
    heads,
    page_stride,
    head_stride,
    token_stride,
    threshold,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    multiply: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
):
    """See `scoring.exempt_last_similar`."""
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    b = tl.program_id(0) % blocks
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    if b * block >= length:
        return
    line = row.to(tl.int64) * n
    rank = b * block + tl.arange(0, block)
    valid = rank < length
    cell = tl.load(cells + line + rank, mask=valid, other=0)
    own = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
    own_scale = tl.load(inverse + line + rank, mask=valid, other=0.0)
    last = tl.where(valid, -1, 0)
    value = tl.zeros([block], tl.float32)
    start = (length - 1) // block * block
    while (start >= 0) & (tl.min(last, axis=0) < 0):
        column = start + tl.arange(0, block)
        there = column < length
        cell = tl.load(cells + line + column, mask=there, other=0)
        other = latents_at(
            pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk
        )
        other_scale = tl.load(inverse + line + column, mask=there, other=0.0)
        product = tl.zeros([block, block], tl.float32)
        for begin in range(0, dim, width):
            a = load_part(own, valid, begin, element, width).to(multiply)
            c = load_part(other, there, begin, element, width).to(multiply)
            product = tl.dot(a, tl.trans(c), product, input_precision="ieee")
        cosine = product * own_scale[:, None] * other_scale[None, :]
        # A key is not similar to itself: the diagonal counts as zero, also against a negative threshold.
        cosine = tl.where(rank[:, None] == column[None, :], 0.0, cosine)
        similar = (cosine > threshold) & there[None, :]
        found = tl.max(tl.where(similar, column[None, :], -1), axis=1)
        of_found = tl.sum(tl.where(column[None, :] == found[:, None], cosine, 0.0), axis=1)
        fresh = (last < 0) & (found >= 0)
        value = tl.where(fresh, of_found, value)
        last = tl.where(fresh, found, last)
        start -= block
    # Ranks without a similar column exempt column 0.
    cell = tl.load(cells + line + tl.arange(0, 1))
    zero = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
    to_zero = tl.zeros([block], tl.float32)
    for begin in range(0, dim, width):
        a = load_part(own, valid, begin, element, width).to(tl.float32)
        to_zero += tl.sum(a * load_part(zero, cell >= 0, begin, element, width).to(tl.float32), axis=1)
    to_zero *= own_scale * tl.load(inverse + line)
    value = tl.where(last < 0, tl.where(rank == 0, 0.0, to_zero), value)
    last = tl.maximum(last, 0)
    units = (value * FIXED).to(tl.int64)
    tl.atomic_add(exempted + line + last, units, mask=valid)


@kernel("total")
def mean_cosine(
    pointers,
    num_resident,
    cells,
    inverse,
    total,
    exempted,
    mean,
    first,
    n,
    layers,
    heads,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
):
    """See `scoring.mean_cosine`."""
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    b = tl.program_id(0) % blocks
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    if b * block >= length:
        return
    line = row.to(tl.int64) * n
    rank = b * block + tl.arange(0, block)
    valid = rank < length
    cell = tl.load(cells + line + rank, mask=valid, other=0)
    at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
    scale = tl.load(inverse + line + rank, mask=valid, other=0.0)[:, None]
    others = tl.zeros([block], tl.float32)
    for begin in range(0, dim, width):
        unit = load_part(at, valid, begin, element, width).to(tl.float32) * scale
        direction = tl.load(total + row.to(tl.int64) * dim + begin + tl.arange(0, width))
        others += tl.sum(unit * (direction[None, :] - unit), axis=1)
    spared = tl.load(exempted + line + rank, mask=valid, other=0).to(tl.float32) / FIXED
    tl.store(mean + line + rank, (others - spared) / length.to(tl.float32), mask=valid)
