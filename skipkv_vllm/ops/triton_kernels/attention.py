# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`measure_attention` and `key_similarity`.

`measure_attention` takes two passes: each query's softmax and output, a block of tokens at a time, then each token's
sum over the queries. The second pass computes the logits again, so nothing is stored per pair of query and token.
`first` is the first row of a launch, so that scratch memory stays bounded; rows of scratch memory are numbered from 0.
A row has `window * group` query heads, by query; those of queries that do not count come first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel
from .rows import EPSILON, cells_of, load_vectors, row_of

# Members of `Effect`.
OUTPUT, VALUE, KEY = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SEEN, NEGLIGIBLE = tl.constexpr(5), tl.constexpr(6)


@triton.jit
def _load_queries(queries, request, layer, head, number, q, counts, layers, heads, dim, window, group, multiply, dims):
    """Load query heads `[tile, dims]`, numbered from the first that counts."""
    d = tl.arange(0, dims)
    every = (window - number) * group + q
    line = ((request * layers + layer).to(tl.int64) * window + every // group) * heads + head
    offset = (line * group + every % group) * dim
    return tl.load(queries + offset[:, None] + d[None, :], mask=counts[:, None] & (d < dim)[None, :], other=0.0).to(
        multiply
    )


@kernel("queries", "outputs")
def attend_queries(
    pointers,
    table,
    positions,
    num_resident,
    num_queries,
    newest,
    queries,
    sinks,
    top,
    share,
    squares,
    outputs,
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
    effect: tl.constexpr,
    valued: tl.constexpr,
    errors: tl.constexpr,
    sunk: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the softmax of a tile of query heads over all tokens, and their outputs with `errors`.

    Writes top, share and squares `[rows, window * group]`: largest logit, effect of a token with the weight 1, and
    |o|^2; and outputs `[rows, window * group, dim]`. With `sunk`, sinks `[layers, heads * group]` are logits of sinks.
    """
    tiles = tl.cdiv(window * group, tile)
    row = tl.program_id(0) // tiles
    begin = tl.program_id(0) % tiles * tile
    request, layer, head = row_of(first, row, layers, heads)
    number = tl.load(num_queries + request)
    if begin >= number * group:
        return
    q = begin + tl.arange(0, tile)
    counts = q < number * group
    query = _load_queries(
        queries, request, layer, head, number, q, counts, layers, heads, dim, window, group, multiply, dims
    )
    reach = tl.load(newest + request) - (number - 1) + q // group
    length = tl.load(num_resident + request)
    line = (first + row).to(tl.int64) * n
    pages = table + request.to(tl.int64) * table_stride
    highest = tl.full([tile], -float("inf"), tl.float32)
    weight = tl.zeros([tile], tl.float32)
    visible = tl.zeros([tile], tl.float32)
    output = tl.zeros([tile, dims], tl.float32)
    for start in range(0, length, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        key = load_vectors(
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
        )
        position = tl.load(positions + line + slot, mask=valid, other=0)
        seen = valid[None, :] & (position[None, :] <= reach[:, None])
        logit = tl.dot(query, tl.trans(key.to(multiply)), input_precision="ieee") / root
        logit = tl.where(seen, logit, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit, axis=1))
        # Until a query has seen a token there is nothing to subtract.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        part = tl.exp(logit - shift[:, None])
        scale = tl.exp(highest - shift)
        weight = weight * scale + tl.sum(part, axis=1)
        highest = higher
        if effect >= SEEN:
            visible += tl.sum(seen.to(tl.float32), axis=1)
        if errors:
            value = load_vectors(
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
                dim,
            )
            output = output * scale[:, None] + tl.dot(part, value.to(tl.float32), input_precision="ieee")
    if sunk:
        own = (layer * heads + head) * group + q % group
        weight += tl.exp(tl.load(sinks + own, mask=counts, other=-float("inf")) - highest)
    at = row.to(tl.int64) * (window * group) + q
    tl.store(top + at, highest, mask=counts)
    each = 1.0 / weight
    if effect == SEEN:
        each = visible / weight
    elif effect == NEGLIGIBLE:
        each = 1.0 / visible
    tl.store(share + at, each, mask=counts)
    if errors:
        d = tl.arange(0, dims)
        output = output / weight[:, None]
        tl.store(squares + at, tl.sum(output * output, axis=1), mask=counts)
        tl.store(outputs + at[:, None] * dim + d[None, :], output, mask=counts[:, None] & (d < dim)[None, :])


@kernel("queries", "outputs")
def sum_queries(
    pointers,
    table,
    positions,
    num_resident,
    num_queries,
    newest,
    queries,
    top,
    share,
    squares,
    outputs,
    out,
    first,
    n,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    root,
    log_negligible,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    multiply: tl.constexpr,
    effect: tl.constexpr,
    valued: tl.constexpr,
    errors: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    tile: tl.constexpr,
):
    """Compute the results of a block of tokens, sums over all query heads of the row: out `[rows, n]`, of all rows."""
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    slot = tl.program_id(0) % blocks * block + tl.arange(0, block)
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    number = tl.load(num_queries + request)
    valid = slot < length
    line = (first + row).to(tl.int64) * n
    d = tl.arange(0, dims)
    cell = cells_of(table + request.to(tl.int64) * table_stride, slot, valid, page_size)
    key = load_vectors(
        pointers, layer, head, cell, valid, page_stride, head_stride, token_stride, page_size, dim, element, chunk, dims
    )
    transposed = tl.trans(key.to(multiply))
    position = tl.load(positions + line + slot, mask=valid, other=0)
    if valued:
        value = load_vectors(
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
            dim,
        ).to(tl.float32)
        of_value = tl.sum(value * value, axis=1)
        values = tl.trans(value)
    sums = tl.zeros([block], tl.float32)
    for begin in range(0, number * group, tile):
        q = begin + tl.arange(0, tile)
        counts = q < number * group
        query = _load_queries(
            queries, request, layer, head, number, q, counts, layers, heads, dim, window, group, multiply, dims
        )
        at = row.to(tl.int64) * (window * group) + q
        reach = tl.load(newest + request) - (number - 1) + q // group
        seen = counts[:, None] & valid[None, :] & (position[None, :] <= reach[:, None])
        logit = tl.dot(query, transposed, input_precision="ieee") / root
        peak = tl.load(top + at, mask=counts, other=0.0)[:, None]
        each = tl.load(share + at, mask=counts, other=0.0)[:, None]
        if effect == NEGLIGIBLE:
            attention = tl.where(seen & (logit < peak + log_negligible), each, 0.0)
        else:
            attention = tl.exp(tl.where(seen, logit - peak, -float("inf"))) * each
        if effect == VALUE:
            attention = attention * attention * of_value[None, :]
        if errors:
            output = tl.load(
                outputs + at[:, None] * dim + d[None, :], mask=counts[:, None] & (d < dim)[None, :], other=0.0
            )
            of_output = tl.load(squares + at, mask=counts, other=0.0)[:, None]
            # |x v - y o|^2, multiplied out.
            mixed = tl.dot(output, values, input_precision="ieee")
            if effect == OUTPUT:
                apart = of_value[None, :] - 2.0 * mixed + of_output
            elif effect == KEY:
                apart = logit * logit * (of_value[None, :] - 2.0 * mixed + of_output)
            else:
                more = logit + 1.0
                apart = more * more * of_value[None, :] - 2.0 * more * logit * mixed + logit * logit * of_output
            attention = attention * attention * tl.maximum(apart, 0.0)
        sums += tl.sum(attention, axis=0)
    tl.store(out + line + slot, tl.where(valid, sums / group, 0.0), mask=slot < n)


@kernel()
def compare_keys(
    pointers,
    table,
    num_resident,
    out,
    n,
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
    block: tl.constexpr,
    dims: tl.constexpr,
):
    """Compute the cosines of a row's keys with the mean of their unit vectors: out `[rows, n]`."""
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    length = tl.load(num_resident + request)
    pages = table + request.to(tl.int64) * table_stride
    mean = tl.zeros([dims], tl.float32)
    for start in range(0, length, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        key = load_vectors(
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
        ).to(tl.float32)
        scale = 1.0 / (tl.sqrt(tl.sum(key * key, axis=1)) + EPSILON)
        mean += tl.sum(key * scale[:, None], axis=0)
    mean = mean / length.to(tl.float32)
    mean = mean / (tl.sqrt(tl.sum(mean * mean, axis=0)) + EPSILON)
    for start in range(0, n, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        key = load_vectors(
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
        ).to(tl.float32)
        scale = 1.0 / (tl.sqrt(tl.sum(key * key, axis=1)) + EPSILON)
        cosine = tl.sum(key * mean[None, :], axis=1) * scale
        tl.store(out + row.to(tl.int64) * n + slot, tl.where(valid, cosine, 0.0), mask=slot < n)
