# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`vector_norms`, `pool_neighbours` and `central_tokens`.

A rank is a token's place in ascending position. `first` is the first row of a launch, so that scratch memory stays
bounded; rows of scratch memory are numbered from 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel
from .rows import cells_of, load_vectors, row_of

INFINITY = tl.constexpr(float("inf"))


@kernel()
def measure_vectors(
    pointers,
    table,
    num_resident,
    order,
    weights,
    out,
    first,
    n,
    part,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    skip: tl.constexpr,
    norm: tl.constexpr,
    centred: tl.constexpr,
    ordered: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
):
    """Compute the norms of a part of a row: out `[rows, n]`, of all rows; order `[rows, n]` is scratch memory."""
    parts = tl.cdiv(n, part)
    row = tl.program_id(0) // parts
    begin = tl.program_id(0) % parts * part
    request, layer, head = row_of(first, row, layers, heads)
    last = tl.minimum(begin + part, n)
    end = tl.minimum(last, tl.load(num_resident + request))
    line = (first + row).to(tl.int64) * n
    pages = table + request.to(tl.int64) * table_stride
    centre = tl.zeros([dims], tl.float32)
    if centred:
        for start in range(begin, end, block):
            rank = start + tl.arange(0, block)
            valid = rank < end
            slot = rank
            if ordered:
                slot = tl.load(order + row.to(tl.int64) * n + rank, mask=valid, other=0)
            cell = cells_of(pages, slot, valid, page_size)
            vector = load_vectors(
                pointers,
                layer,
                head,
                cell,
                valid,
                page_stride,
                head_stride,
                token_stride,
                page_size,
                dim,
                element,
                chunk,
                dims,
                skip,
            ).to(tl.float32)
            if weighted:
                vector *= tl.load(weights + line + slot, mask=valid, other=0.0)[:, None]
            centre += tl.sum(vector, axis=0)
        if not weighted:
            centre = centre / tl.maximum(end - begin, 1).to(tl.float32)
    for start in range(begin, last, block):
        rank = start + tl.arange(0, block)
        valid = rank < end
        slot = rank
        if ordered:
            slot = tl.load(order + row.to(tl.int64) * n + rank, mask=rank < last, other=0)
        cell = cells_of(pages, slot, valid, page_size)
        vector = load_vectors(
            pointers,
            layer,
            head,
            cell,
            valid,
            page_stride,
            head_stride,
            token_stride,
            page_size,
            dim,
            element,
            chunk,
            dims,
            skip,
        ).to(tl.float32)
        apart = vector - centre[None, :]
        size = tl.sum(tl.abs(apart) if norm == 1 else apart * apart, axis=1)
        if norm == 2:
            size = tl.sqrt(size)
        tl.store(out + line + slot, tl.where(valid, size, 0.0), mask=rank < last)


@kernel()
def pool_ranks(
    scores,
    num_resident,
    order,
    out,
    first,
    n,
    rows_per_request,
    window,
    pool: tl.constexpr,
    block: tl.constexpr,
):
    """Compute the largest score among the neighbours of a block of ranks: out `[rows, n]` by slot, of all rows."""
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    rank = tl.program_id(0) % blocks * block + tl.arange(0, block)
    length = tl.load(num_resident + (first + row) // rows_per_request)
    line = (first + row).to(tl.int64) * n
    order += row.to(tl.int64) * n
    old = rank < length - window
    pooled = tl.full([block], -INFINITY, tl.float32)
    for o in range(pool):
        neighbour = rank + (o - pool // 2)
        near = old & (neighbour >= 0) & (neighbour < length - window)
        slot = tl.load(order + neighbour, mask=near, other=0)
        pooled = tl.maximum(pooled, tl.load(scores + line + slot, mask=near, other=-INFINITY))
    pooled = tl.where((rank < length) & (rank >= length - window), 0.0, pooled)
    tl.store(out + line + tl.load(order + rank, mask=rank < n, other=0), pooled, mask=rank < n)


@triton.jit
def rank_from(order, positions, length, position):
    """Return the lowest rank of a row whose position is not below a position."""
    low = length * 0
    high = length
    while low < high:
        middle = (low + high) // 2
        below = tl.load(positions + tl.load(order + middle)) < position
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _load_tokens(
    pointers,
    pages,
    order,
    layer,
    head,
    token,
    valid,
    page_stride,
    head_stride,
    token_stride,
    page_size,
    dim,
    element,
    chunk,
    dims,
):
    """Load the keys `[tokens, dims]` of some ranks as float32."""
    cell = cells_of(pages, tl.load(order + token, mask=valid, other=0), valid, page_size)
    key = load_vectors(
        pointers, layer, head, cell, valid, page_stride, head_stride, token_stride, page_size, dim, element, chunk, dims
    )
    return key.to(tl.float32)


@kernel("centroids")
def choose_central(
    pointers,
    table,
    positions,
    num_resident,
    begin,
    end,
    quota,
    order,
    centroids,
    assigned,
    distance,
    out,
    first,
    n,
    segments,
    longest,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    tie,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    most: tl.constexpr,
    rounds: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
):
    """Choose the central tokens of a segment of a row: out `[rows, n]` by slot, of all rows, zero before.

    Scratch memory: order, assigned and distance `[rows, n]` by rank, centroids `[rows, segments, most, dims]`.
    """
    row = tl.program_id(0) // segments
    number = tl.program_id(0) % segments
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    line = (first + row).to(tl.int64) * n
    order += row.to(tl.int64) * n
    low = tl.load(begin + request).to(tl.int64) + number.to(tl.int64) * longest
    high = tl.minimum(low + longest, tl.load(end + request).to(tl.int64))
    start = rank_from(order, positions + line, length, low)
    count = tl.maximum(rank_from(order, positions + line, length, high) - start, 0)
    most_kept = tl.load(quota + request.to(tl.int64) * segments + number)
    order += start
    at = tl.arange(0, block)
    if count <= most_kept:
        for tile in range(0, count, block):
            valid = tile + at < count
            slot = tl.load(order + tile + at, mask=valid, other=0)
            tl.store(out + line + slot, tl.full([block], 1, tl.int8), mask=valid)
        return
    if most_kept <= 0:
        return
    pages = table + request.to(tl.int64) * table_stride
    wanted = tl.minimum(most_kept, most)
    cluster = tl.arange(0, most)
    used = cluster < wanted
    d = tl.arange(0, dims)
    centroids += tl.program_id(0).to(tl.int64) * (most * dims)
    whole = centroids + cluster[:, None] * dims + d[None, :]
    assigned += row.to(tl.int64) * n + start
    distance += row.to(tl.int64) * n + start
    # The first centroids are tokens evenly spread over the segment.
    place = ((2 * cluster + 1).to(tl.int64) * count // (2 * wanted)).to(tl.int32)
    centres = _load_tokens(
        pointers,
        pages,
        order,
        layer,
        head,
        place,
        used,
        page_stride,
        head_stride,
        token_stride,
        page_size,
        dim,
        element,
        chunk,
        dims,
    )
    for _ in range(rounds + 1):
        tl.store(whole, centres)
        # Other threads of this program may have written the centroids.
        tl.debug_barrier()
        total = tl.zeros([most, dims], tl.float32)
        size = tl.zeros([most], tl.float32)
        for tile in range(0, count, block):
            token = tile + at
            valid = token < count
            key = _load_tokens(
                pointers,
                pages,
                order,
                layer,
                head,
                token,
                valid,
                page_stride,
                head_stride,
                token_stride,
                page_size,
                dim,
                element,
                chunk,
                dims,
            )
            least = tl.full([block], INFINITY, tl.float32)
            nearest = tl.zeros([block], tl.int32)
            for j in range(wanted):
                apart = key - tl.load(centroids + j * dims + d)[None, :]
                square = tl.sum(apart * apart, axis=1)
                nearest = tl.where(square < least, j, nearest)
                least = tl.minimum(square, least)
            member = ((cluster[:, None] == nearest[None, :]) & valid[None, :]).to(tl.float32)
            size += tl.sum(member, axis=1)
            total += tl.dot(member, key, input_precision="ieee")
            tl.store(assigned + token, nearest, mask=valid)
            tl.store(distance + token, least, mask=valid)
        tl.debug_barrier()
        centres = tl.where(size[:, None] > 0, total / tl.maximum(size, 1.0)[:, None], centres)
    closest = tl.full([most], INFINITY, tl.float32)
    for tile in range(0, count, block):
        valid = tile + at < count
        nearest = tl.load(assigned + tile + at, mask=valid, other=-1)
        least = tl.load(distance + tile + at, mask=valid, other=INFINITY)
        own = tl.where(cluster[:, None] == nearest[None, :], least[None, :], INFINITY)
        closest = tl.minimum(closest, tl.min(own, axis=1))
    chosen = tl.full([most], 0, tl.int32) + count
    for tile in range(0, count, block):
        valid = tile + at < count
        nearest = tl.load(assigned + tile + at, mask=valid, other=-1)
        least = tl.load(distance + tile + at, mask=valid, other=INFINITY)
        near = (cluster[:, None] == nearest[None, :]) & (least[None, :] <= closest[:, None] * tie)
        chosen = tl.minimum(chosen, tl.min(tl.where(near, (tile + at)[None, :], count), axis=1))
    found = used & (chosen < count)
    slot = tl.load(order + chosen, mask=found, other=0)
    tl.store(out + line + slot, tl.full([most], 1, tl.int8), mask=found)
