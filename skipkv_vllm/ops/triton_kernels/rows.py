# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""Shared by the kernels that read keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-8)


@triton.jit
def row_of(first, row, layers, heads):
    whole = first + row
    return whole // (layers * heads), whole // heads % layers, whole % heads


@triton.jit
def of_bits(stored, element):
    """Return what was loaded; float16 for the bits of an 8-bit `element`."""
    # One return: the compiler also reads the code after a return in a branch, and requires one type of all returns.
    if element == tl.float8e5:
        stored = (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif element == tl.float8e4nv:
        # Shifted by one bit less, these are the bits of the value divided by 2^8; the largest magnitude is NaN.
        bits = ((stored & 0x80).to(tl.uint16) << 8) | ((stored & 0x7F).to(tl.uint16) << 7)
        value = bits.to(tl.float16, bitcast=True) * 256.0
        stored = tl.where((stored & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return stored


@triton.jit
def load_vectors(
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
    skip=0,
):
    """Load keys `[cells, dims]`, or values with `skip` = dim, in the cache's dtype; zero outside.

    Those of 8 bits become float16, which represents them exactly. Strides count chunks of `chunk` elements, of which
    addresses are multiples: so the compiler knows that it may read a chunk at once.
    """
    d = tl.arange(0, dims)
    # Load the bits, because compilers for older GPUs refuse the type itself.
    stored: tl.constexpr = tl.uint8 if element.primitive_bitwidth == 8 else element
    address = tl.load(pointers + layer).to(tl.pointer_type(stored))
    base = tl.multiple_of(address, chunk * (element.primitive_bitwidth // 8)) + (
        head.to(tl.int64) * head_stride * chunk + skip
    )
    offset = (cell // page_size).to(tl.int64) * page_stride + (cell % page_size).to(tl.int64) * token_stride
    inside = valid[:, None] & (d < dim)[None, :]
    return of_bits(tl.load(base + (offset * chunk)[:, None] + d[None, :], mask=inside, other=0), element)


@triton.jit
def cells_of(table, slot, valid, page_size):
    """Compute the cells (page * page_size + offset) of slots, by their request's page table."""
    page = tl.load(table + slot // page_size, mask=valid, other=0)
    return page * page_size + slot % page_size
