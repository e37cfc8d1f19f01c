# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""Tokens on their way to the store in host memory and back, and the attention to their sketches.

The store is contiguous, `[S, L, H, P, 2 * D]`, and so are the sketches. Strides of the caches count chunks of `chunk`
elements. Copies leave the bits as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel
from .rows import cells_of, load_vectors, of_bits, row_of


@triton.jit
def _base(pointers, layer, element, chunk):
    """Return the address of a layer's cache, of whose elements of 8 bits only the bits are read."""
    stored: tl.constexpr = tl.uint8 if element.primitive_bitwidth == 8 else element
    base = tl.load(pointers + layer).to(tl.pointer_type(stored))
    return tl.multiple_of(base, chunk * (element.primitive_bitwidth // 8))


@triton.jit
def _in_store(stored, head, stored_size, dim):
    """Return the address of a head in the store's first page and layer; tensors begin at multiples of 16 bytes."""
    return tl.multiple_of(stored + head.to(tl.int64) * (stored_size * 2 * dim), 16)


@kernel()
def key_moments(
    pointers,
    table,
    first,
    end,
    out,
    rows,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """Compute mean and standard deviation of a row's keys, in two passes; one program a row."""
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    request = request.to(tl.int64)
    start = tl.load(first + request)
    stop = tl.load(end + request)
    d = tl.arange(0, dims)
    mean = tl.zeros([dims], tl.float32)
    for squared in tl.static_range(2):
        total = tl.zeros([dims], tl.float32)
        for begin in range(start, stop, block):
            slot = begin + tl.arange(0, block)
            valid = slot < stop
            cell = cells_of(table + request * table_stride, slot, valid, page_size)
            key = load_vectors(
                *(pointers, layer, head, cell, valid, page_stride, head_stride, token_stride),
                *(page_size, dim, element, chunk, dims),
            ).to(tl.float32)
            if squared == 1:
                key = (key - mean[None, :]) * (key - mean[None, :])
            total += tl.sum(tl.where(valid[:, None], key, 0.0), axis=0)
        total = total / (stop - start)
        if squared == 0:
            mean = total
            tl.store(out + row.to(tl.int64) * dim + d, mean, mask=d < dim)
        else:
            tl.store(out + (rows + row).to(tl.int64) * dim + d, tl.sqrt(total), mask=d < dim)


@kernel()
def store_rows(
    pointers,
    table,
    spans,
    stored_table,
    centre,
    spread,
    stored,
    signs,
    sizes,
    layers,
    heads,
    table_stride,
    stored_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    stored_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """Copy and sketch `block` tokens of a row; the second dimension of the grid covers the longest span."""
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    request = request.to(tl.int64)
    slot = tl.load(spans + 3 * request)
    number = tl.load(spans + 3 * request + 1)
    place = tl.load(spans + 3 * request + 2)
    i = tl.program_id(1) * block + tl.arange(0, block)
    valid = i < number
    page = tl.load(table + request * table_stride + (slot + i) // page_size, mask=valid, other=0).to(tl.int64)
    cell = page * page_stride + head.to(tl.int64) * head_stride + ((slot + i) % page_size).to(tl.int64) * token_stride
    target = tl.load(stored_table + request * stored_stride + (place + i) // stored_size, mask=valid, other=0)
    line = (target.to(tl.int64) * layers + layer) * heads + head
    line = line * stored_size + (place + i) % stored_size

    base = _base(pointers, layer, element, chunk)
    stored = _in_store(stored, head, stored_size, dim)
    d = tl.arange(0, dims)
    inside = valid[:, None] & (d < dim)[None, :]
    key = tl.load(base + (cell * chunk)[:, None] + d[None, :], mask=inside, other=0)
    tl.store(stored + ((line - head * stored_size) * 2 * dim)[:, None] + d[None, :], key, mask=inside)
    value = tl.load(base + (cell * chunk)[:, None] + dim + d[None, :], mask=inside, other=0)
    tl.store(stored + ((line - head * stored_size) * 2 * dim)[:, None] + dim + d[None, :], value, mask=inside)

    of_row = ((request * layers + layer) * heads + head) * dim
    middle = tl.load(centre + of_row + d, mask=d < dim, other=0.0)
    scale = tl.load(spread + of_row + d, mask=d < dim, other=1.0)
    distance = tl.where(inside, (of_bits(key, element).to(tl.float32) - middle[None, :]) / scale[None, :], 0.0)
    tl.store(sizes + line, tl.sum(tl.abs(distance), axis=1) / dim, mask=valid)
    # Eight elements share a byte of signs.
    bits = tl.reshape((distance > 0).to(tl.int32), [block, dims // 8, 8]) << tl.arange(0, 8)[None, None, :]
    j = tl.arange(0, dims // 8)
    inside = valid[:, None] & (j < dim // 8)[None, :]
    tl.store(signs + (line * (dim // 8))[:, None] + j[None, :], tl.sum(bits, axis=2).to(tl.uint8), mask=inside)


@kernel()
def recall_rows(
    pointers,
    sidecar,
    table,
    slots,
    places,
    first_position,
    stored_table,
    stored,
    layers,
    heads,
    number,
    table_stride,
    stored_stride,
    sidecar_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    stored_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """Write `block` stored tokens into slots of a row."""
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    request = request.to(tl.int64)
    m = tl.program_id(1) * block + tl.arange(0, block)
    place = tl.load(places + row.to(tl.int64) * number + m, mask=m < number, other=-1)
    valid = place >= 0
    source = tl.load(stored_table + request * stored_stride + place // stored_size, mask=valid, other=0)
    line = (source.to(tl.int64) * layers + layer) * heads + head
    line = line * stored_size + place % stored_size
    slot = tl.load(slots + row.to(tl.int64) * number + m, mask=valid, other=0)
    page = tl.load(table + request * table_stride + slot // page_size, mask=valid, other=0).to(tl.int64)
    cell = page * page_stride + head.to(tl.int64) * head_stride + (slot % page_size).to(tl.int64) * token_stride

    base = _base(pointers, layer, element, chunk)
    stored = _in_store(stored, head, stored_size, dim)
    d = tl.arange(0, dims)
    inside = valid[:, None] & (d < dim)[None, :]
    for part in tl.static_range(2):
        content = tl.load(
            stored + ((line - head * stored_size) * 2 * dim)[:, None] + part * dim + d[None, :], mask=inside, other=0
        )
        tl.store(base + (cell * chunk)[:, None] + part * dim + d[None, :], content, mask=inside)
    noted = sidecar + layer.to(tl.int64) * sidecar_stride + (page * heads + head) * page_size + slot % page_size
    tl.store(noted, tl.load(first_position + request) + place, mask=valid)


@triton.jit
def _logits(
    signs,
    sizes,
    stored_table,
    queries,
    row,
    request,
    head,
    layer,
    layers,
    heads,
    stored_stride,
    t,
    valid,
    stored_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    rows: tl.constexpr,
):
    """Return the logits of a row's queries, `[rows, block]`; -inf for tokens that are not valid."""
    page = tl.load(stored_table + request * stored_stride + t // stored_size, mask=valid, other=0)
    line = ((page.to(tl.int64) * layers + layer) * heads + head) * stored_size + t % stored_size
    d = tl.arange(0, dims)
    query = tl.load(
        queries + row.to(tl.int64) * rows * dim + tl.arange(0, rows)[:, None] * dim + d[None, :],
        mask=(d < dim)[None, :],
        other=0.0,
    )
    byte = tl.load(
        signs + (line * (dim // 8))[None, :] + (d // 8)[:, None], mask=valid[None, :] & (d < dim)[:, None], other=0
    )
    sign = (((byte.to(tl.int32) >> (d % 8)[:, None]) & 1) * 2 - 1).to(tl.float32)
    size = tl.load(sizes + line, mask=valid, other=0.0)
    return tl.where(valid[None, :], tl.dot(query, sign) * size[None, :], float("-inf"))


@kernel()
def sum_weights(
    signs,
    sizes,
    stored_table,
    number,
    queries,
    largest,
    total,
    layers,
    heads,
    parts,
    stored_stride,
    stored_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    rows: tl.constexpr,
    part: tl.constexpr,
    block: tl.constexpr,
):
    """Compute the largest logit of each query of a row among `part` tokens, and the sum of exponentials."""
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    request = request.to(tl.int64)
    count = tl.load(number + request)
    best = tl.full([rows], float("-inf"), tl.float32)
    summed = tl.zeros([rows], tl.float32)
    first = tl.program_id(1) * part
    if first < count:
        for start in range(0, part, block):
            t = first + start + tl.arange(0, block)
            valid = t < count
            logits = _logits(
                *(
                    signs,
                    sizes,
                    stored_table,
                    queries,
                    row,
                    request,
                    head,
                    layer,
                    layers,
                    heads,
                    stored_stride,
                    t,
                    valid,
                ),
                *(stored_size, dim, dims, rows),
            )
            higher = tl.maximum(best, tl.max(logits, axis=1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            summed = summed * tl.exp(best - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
            best = higher
    at = (row.to(tl.int64) * parts + tl.program_id(1)) * rows + tl.arange(0, rows)
    tl.store(largest + at, best)
    tl.store(total + at, summed)


@kernel()
def best_weights(
    signs,
    sizes,
    stored_table,
    number,
    queries,
    normaliser,
    out,
    layers,
    heads,
    length,
    stored_stride,
    stored_size: tl.constexpr,
    dim: tl.constexpr,
    dims: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    in_group: tl.constexpr,
    block: tl.constexpr,
):
    """Average the weights over the query heads of a group, and take the largest of the queries.

    Rows of queries are ordered by query, then by head, padded to powers of two; `in_group` heads are none of padding.
    """
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    request = request.to(tl.int64)
    t = tl.program_id(1) * block + tl.arange(0, block)
    count = tl.load(number + request)
    valid = t < count
    rows: tl.constexpr = window * group
    logits = _logits(
        *(signs, sizes, stored_table, queries, row, request, head, layer, layers, heads, stored_stride, t, valid),
        *(stored_size, dim, dims, rows),
    )
    log_sum = tl.load(normaliser + row.to(tl.int64) * rows + tl.arange(0, rows))
    weights = tl.exp(logits - log_sum[:, None])
    mean = tl.sum(tl.reshape(weights, [window, group, block]), axis=1) / in_group
    best = tl.max(mean, axis=0)
    tl.store(out + row.to(tl.int64) * length + t, tl.where(valid, best, 0.0), mask=t < length)
