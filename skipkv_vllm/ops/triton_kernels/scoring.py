# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`score_tokens`: importance and redundancy of all tokens of all rows, with keys read straight from the pages.

A rank is a token's place in ascending position. The matrix of cosines is never stored: its column sums are
`unit_j . sum_i unit_i`, so only the search for each row's last similar column compares pairs, newest columns first,
and it stops at a hit. `first` is the first row of a launch, so that scratch memory stays bounded; rows of scratch
memory are numbered from 0.
"""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel
from .rows import EPSILON, cells_of, load_vectors, row_of

FIXED = tl.constexpr(float(1 << 40))
"""Exempted cosines are added as integers in this unit, so the sum does not depend on the order of the additions."""


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
    windows: tl.constexpr,
):
    """Read the keys once: their cells, 1 / norm, sum of unit keys of the block, logits of the queries.

    Writes cells int32 `[rows, n]` (page * page_size + offset), inverse `[rows, n]`, partial `[rows, blocks, dim]` and
    logits `[rows, window, n]`, all by rank. `multiply` is the dtype of the products of query and key.
    """
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    b = tl.program_id(0) % blocks
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    rank = b * block + tl.arange(0, block)
    valid = rank < length
    line = row.to(tl.int64) * n
    d = tl.arange(0, dims)
    sums = partial + (row.to(tl.int64) * blocks + b) * dim + d
    if b * block >= length:
        tl.store(sums, tl.zeros([dims], tl.float32), mask=d < dim)
        return
    slot = tl.load(order + line + rank, mask=valid, other=0)
    cell = cells_of(table + request.to(tl.int64) * table_stride, slot, valid, page_size)
    tl.store(cells + line + rank, cell, mask=valid)
    key = load_vectors(
        pointers, layer, head, cell, valid, page_stride, head_stride, token_stride, page_size, dim, element, chunk, dims
    )
    wide = key.to(tl.float32)
    scale = 1.0 / (tl.sqrt(tl.sum(wide * wide, axis=1)) + EPSILON)
    tl.store(inverse + line + rank, scale, mask=valid)
    tl.store(sums, tl.sum(wide * scale[:, None], axis=0), mask=d < dim)

    w = tl.arange(0, windows)
    heads_of_queries = queries + ((request * layers + layer).to(tl.int64) * window * heads + head) * group * dim
    heads_of_queries += (w * heads * group * dim)[:, None] + d[None, :]
    inside = (w < window)[:, None] & (d < dim)[None, :]
    transposed = tl.trans(key.to(multiply))
    best = tl.full([windows, block], -float("inf"), tl.float32)
    for g in range(group):
        query = tl.load(heads_of_queries + g * dim, mask=inside, other=0.0).to(multiply)
        best = tl.maximum(best, tl.dot(query, transposed, input_precision="ieee"))
    kept = (w < window)[:, None] & (rank < length - window)[None, :]
    tl.store(logits + line * window + w[:, None].to(tl.int64) * n + rank[None, :], best / root, mask=kept)


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
):
    """For each rank find the last column whose cosine is above the threshold, else column 0, and exempt that cosine.

    Adds to exempted int64 `[rows, n]` by column, in units of 1 / FIXED.
    """
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
    own = load_vectors(
        pointers,
        layer,
        head,
        tl.load(cells + line + rank, mask=valid, other=0),
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
    own_scale = tl.load(inverse + line + rank, mask=valid, other=0.0)
    last = tl.where(valid, -1, 0)
    value = tl.zeros([block], tl.float32)
    start = (length - 1) // block * block
    while (start >= 0) & (tl.min(last, axis=0) < 0):
        column = start + tl.arange(0, block)
        there = column < length
        other = load_vectors(
            pointers,
            layer,
            head,
            tl.load(cells + line + column, mask=there, other=0),
            there,
            page_stride,
            head_stride,
            token_stride,
            page_size,
            dim,
            element,
            chunk,
            dims,
        )
        other_scale = tl.load(inverse + line + column, mask=there, other=0.0)
        product = tl.dot(own.to(multiply), tl.trans(other.to(multiply)), input_precision="ieee")
        cosine = product * own_scale[:, None] * other_scale[None, :]
        # A key is not similar to itself: the diagonal counts as zero, also against a negative threshold.
        cosine = tl.where(rank[:, None] == column[None, :], 0.0, cosine)
        similar = (cosine > threshold) & there[None, :]
        found = tl.max(tl.where(similar, column[None, :], -1), axis=1)
        at = tl.sum(tl.where(column[None, :] == found[:, None], cosine, 0.0), axis=1)
        fresh = (last < 0) & (found >= 0)
        value = tl.where(fresh, at, value)
        last = tl.where(fresh, found, last)
        start -= block
    # Ranks without a similar column exempt column 0.
    zero = load_vectors(
        pointers,
        layer,
        head,
        tl.load(cells + line + tl.arange(0, 1)),
        tl.full([1], 1, tl.int1),
        page_stride,
        head_stride,
        token_stride,
        page_size,
        dim,
        element,
        chunk,
        dims,
    )
    to_zero = tl.sum(own.to(tl.float32) * zero.to(tl.float32), axis=1) * own_scale * tl.load(inverse + line)
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
):
    """Compute the mean cosine of each key with all others, without the exempted ones: mean `[rows, n]` by rank."""
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
    key = load_vectors(
        pointers, layer, head, cell, valid, page_stride, head_stride, token_stride, page_size, dim, element, chunk, dims
    )
    unit = key.to(tl.float32) * tl.load(inverse + line + rank, mask=valid, other=0.0)[:, None]
    d = tl.arange(0, dims)
    direction = tl.load(total + row.to(tl.int64) * dim + d, mask=d < dim, other=0.0)
    others = tl.sum(unit * (direction[None, :] - unit), axis=1)
    spared = tl.load(exempted + line + rank, mask=valid, other=0).to(tl.float32) / FIXED
    tl.store(mean + line + rank, (others - spared) / length.to(tl.float32), mask=valid)


@kernel()
def attend(
    num_resident,
    logits,
    mean,
    attention,
    normaliser,
    first,
    n,
    layers,
    heads,
    window: tl.constexpr,
    redundancy: tl.constexpr,
    block: tl.constexpr,
    windows: tl.constexpr,
):
    """Compute the softmaxes of a row: attention `[rows, n]`, query mean, and normaliser `[rows]` of redundancy."""
    row = tl.program_id(0)
    length = tl.load(num_resident + (first + row) // (layers * heads))
    old = length - window
    line = row.to(tl.int64) * n
    w = tl.arange(0, windows)
    lines = logits + line * window + w[:, None].to(tl.int64) * n
    top = tl.full([windows], -float("inf"), tl.float32)
    weight = tl.zeros([windows], tl.float32)
    for start in range(0, old, block):
        rank = start + tl.arange(0, block)
        inside = (w < window)[:, None] & (rank < old)[None, :]
        logit = tl.load(lines + rank[None, :], mask=inside, other=-float("inf"))
        logit = tl.where((w < window)[:, None], logit, 0.0)
        new_top = tl.maximum(top, tl.max(logit, axis=1))
        weight = weight * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top[:, None]), axis=1)
        top = new_top
    for start in range(0, old, block):
        rank = start + tl.arange(0, block)
        inside = (w < window)[:, None] & (rank < old)[None, :]
        logit = tl.load(lines + rank[None, :], mask=inside, other=-float("inf"))
        share = tl.where(inside, tl.exp(logit - top[:, None]) / weight[:, None], 0.0)
        tl.store(attention + line + rank, tl.sum(share, axis=0) / window, mask=rank < old)
    if redundancy:
        # Mean cosines lie within -2 and 2, so their softmax needs no maximum.
        whole = tl.zeros([block], tl.float32)
        for start in range(0, length, block):
            rank = start + tl.arange(0, block)
            whole += tl.exp(tl.load(mean + line + rank, mask=rank < length, other=-float("inf")))
        tl.store(normaliser + row, tl.sum(whole, axis=0))


@kernel()
def combine(
    num_resident,
    order,
    attention,
    mean,
    normaliser,
    penalty,
    out,
    first,
    n,
    layers,
    heads,
    mix,
    window: tl.constexpr,
    pool: tl.constexpr,
    redundancy: tl.constexpr,
    penalised: tl.constexpr,
    block: tl.constexpr,
):
    """Pool the attention over neighbours, mix in redundancy, subtract the penalty; write out `[rows, n]` by slot."""
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    b = tl.program_id(0) % blocks
    length = tl.load(num_resident + (first + row) // (layers * heads))
    line = row.to(tl.int64) * n
    rank = b * block + tl.arange(0, block)
    valid = rank < length
    slot = tl.load(order + line + rank, mask=rank < n, other=0)
    old = rank < length - window
    pooled = tl.zeros([block], tl.float32)
    for o in range(pool):
        neighbour = rank + (o - pool // 2)
        near = old & (neighbour >= 0) & (neighbour < length - window)
        pooled = tl.maximum(pooled, tl.load(attention + line + neighbour, mask=near, other=0.0))
    score = mix * pooled
    if redundancy:
        share = tl.exp(tl.load(mean + line + rank, mask=old, other=0.0)) / tl.load(normaliser + row)
        score -= (1.0 - mix) * share
    score = tl.where(old, score, 0.0)
    if penalised:
        score -= tl.load(penalty + line + slot, mask=valid, other=0.0)
    tl.store(out + line + slot, tl.where(valid, score, -float("inf")), mask=rank < n)
