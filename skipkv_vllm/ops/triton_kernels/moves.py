# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`compact_pages`: first whole pages, then single cells. Cells are copied bit by bit, as integers.

Two launches on one stream, because a move may fill a hole of a page that was just copied. Offsets in the caches count
elements of `element`, the widest integer that fits; strides count chunks of `chunk` of them, at most 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel


@triton.jit
def _base(pointers, layer, element, chunk):
    """Return the address of a layer's cache."""
    base = tl.load(pointers + layer).to(tl.pointer_type(element))
    return tl.multiple_of(base, chunk * (element.primitive_bitwidth // 8))


@kernel()
def copy_pages(
    pointers,
    sidecar,
    positions,
    source_table,
    target_table,
    num_keep,
    pages,
    n,
    layers,
    heads,
    source_stride,
    target_stride,
    sidecar_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    width: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """Copy replaced pages and record the positions of the first K slots; one program a (request, layer, page)."""
    index = tl.program_id(0) % pages
    layer = tl.program_id(0) // pages % layers
    request = tl.program_id(0) // pages // layers
    keep = tl.load(num_keep + request)
    if index * page_size >= keep:
        return
    old = tl.load(source_table + request.to(tl.int64) * source_stride + index).to(tl.int64)
    new = tl.load(target_table + request.to(tl.int64) * target_stride + index).to(tl.int64)

    known = positions + (request * layers + layer).to(tl.int64) * heads * n + index * page_size
    noted = sidecar + layer.to(tl.int64) * sidecar_stride + new * heads * page_size
    for start in range(0, heads * page_size, block):
        cell = start + tl.arange(0, block)
        head = cell // page_size
        offset = cell % page_size
        inside = (cell < heads * page_size) & (index * page_size + offset < keep)
        position = tl.load(known + head.to(tl.int64) * n + offset, mask=inside, other=0)
        tl.store(noted + cell, position, mask=inside)

    if old != new:
        base = _base(pointers, layer, element, chunk)
        for start in range(0, heads * page_size * width, block):
            i = start + tl.arange(0, block)
            cell = i // width
            at = (cell // page_size).to(tl.int64) * head_stride + (cell % page_size).to(tl.int64) * token_stride
            at = at * chunk + i % width
            inside = i < heads * page_size * width
            content = tl.load(base + old * page_stride * chunk + at, mask=inside, other=0)
            tl.store(base + new * page_stride * chunk + at, content, mask=inside)


@kernel()
def move_cells(
    pointers,
    sidecar,
    positions,
    source_table,
    target_table,
    source,
    hole,
    count,
    n,
    max_moves,
    layers,
    heads,
    source_stride,
    target_stride,
    sidecar_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    width: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    widths: tl.constexpr,
):
    """Move cells of one row, K and V together, and their positions; one program per `block` moves."""
    blocks = tl.cdiv(max_moves, block)
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * block
    moves = tl.load(count + row)
    if first >= moves:
        return
    head = row % heads
    layer = row // heads % layers
    request = row // heads // layers
    i = first + tl.arange(0, block)
    valid = i < moves
    line = row.to(tl.int64) * max_moves
    from_slot = tl.load(source + line + i, mask=valid, other=0)
    to_slot = tl.load(hole + line + i, mask=valid, other=0)
    old = source_table + request.to(tl.int64) * source_stride
    new = target_table + request.to(tl.int64) * target_stride
    from_page = tl.load(old + from_slot // page_size, mask=valid, other=0).to(tl.int64)
    to_page = tl.load(new + to_slot // page_size, mask=valid, other=0).to(tl.int64)

    position = tl.load(positions + row.to(tl.int64) * n + from_slot, mask=valid, other=0)
    noted = sidecar + layer.to(tl.int64) * sidecar_stride
    tl.store(noted + (to_page * heads + head) * page_size + to_slot % page_size, position, mask=valid)

    base = _base(pointers, layer, element, chunk) + head.to(tl.int64) * head_stride * chunk
    read = from_page * page_stride + (from_slot % page_size).to(tl.int64) * token_stride
    write = to_page * page_stride + (to_slot % page_size).to(tl.int64) * token_stride
    e = tl.arange(0, widths)
    inside = valid[:, None] & (e < width)[None, :]
    content = tl.load(base + (read * chunk)[:, None] + e[None, :], mask=inside, other=0)
    tl.store(base + (write * chunk)[:, None] + e[None, :], content, mask=inside)
