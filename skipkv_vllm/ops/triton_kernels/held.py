# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`held_positions` and `token_penalties`: one program per `block` resident tokens."""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel


@kernel()
def read_positions(
    sidecar,
    table,
    num_placed,
    num_evicted,
    out,
    total,
    length,
    layers,
    heads,
    pages,
    width,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """Read the positions `[R, L, H, length]` of the slots of R requests."""
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < total
    slot, row = i % length, i // length
    head, layer, request = row % heads, row // heads % layers, row // heads // layers
    placed = tl.load(num_placed + request, mask=inside, other=0)
    evicted = tl.load(num_evicted + request, mask=inside, other=0)
    stored = inside & (slot < placed)
    page = tl.load(table + request * width + slot // size, mask=stored, other=0)
    entry = ((layer * pages + page) * heads + head) * size + slot % size
    position = tl.where(stored, tl.load(sidecar + entry, mask=stored, other=0), (slot + evicted).to(tl.int32))
    tl.store(out + i, position, mask=inside)


@kernel()
def look_up_penalties(
    ends,
    penalties,
    first,
    rows,
    positions,
    out,
    total,
    of_request,
    most,
    ends_stride,
    penalty_stride,
    halvings: tl.constexpr,
    block: tl.constexpr,
):
    """Look up the penalty of each token's sentence by binary search in the sentences' ends."""
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < total
    row = tl.load(rows + i // of_request, mask=inside, other=0)
    position = tl.load(positions + i, mask=inside, other=-1)
    low = tl.zeros([block], tl.int64)
    high = low + most - 1
    for _ in range(halvings):
        middle = (low + high) // 2
        before = tl.load(ends + row * ends_stride + middle, mask=inside, other=0) < position
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, middle)
    found = tl.load(penalties + row * penalty_stride + low, mask=inside, other=0.0)
    tracked = position >= tl.load(first + row, mask=inside, other=0)
    tl.store(out + i, tl.where(tracked, found, 0.0), mask=inside)
