# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`record_queries` and `steer_add`: one program per token and `block` elements, fit for CUDA graphs."""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel
from .rows import of_bits


@kernel("query", "ring")
def copy_queries(
    query,
    index,
    ring,
    scale,
    last,
    token_stride,
    head_stride,
    row_stride,
    element: tl.constexpr,
    scaled: tl.constexpr,
    chunk: tl.constexpr,
    dim: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """`ring[index[t]] = query[t]`, but nothing for row `last`; a row is contiguous, `size` elements.

    With `scaled`, query holds the bits of 8-bit elements, and each `scaled` elements of a row share a scale. Strides
    count chunks of `chunk` elements.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(index + token)
    if row == last:
        return
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < size
    from_head = (token * token_stride + (i // dim) * head_stride) * chunk
    value = tl.load(query + from_head + i % dim, mask=inside, other=0)
    if scaled > 0:
        value = of_bits(value, element).to(tl.float32) * tl.load(scale + i // scaled, mask=inside, other=0.0)
    tl.store(ring + row * row_stride * chunk + i, value.to(ring.dtype.element_ty), mask=inside)


@kernel("hidden", "vectors", "out")
def add_steering(
    hidden,
    coefficient,
    choice,
    vectors,
    out,
    hidden_stride,
    vector_stride,
    out_stride,
    chunk: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """See `torch_backend.steer_add`; the last dimensions are contiguous, strides count chunks of `chunk` elements."""
    i = tl.program_id(1) * block + tl.arange(0, block)
    token = tl.program_id(0).to(tl.int64)
    # One copy per element: the interpreter cannot mask a block with a scalar's comparison.
    number = tl.load(choice + token).to(tl.int64) + tl.zeros([block], tl.int64)
    before = tl.load(hidden + token * hidden_stride * chunk + i, mask=i < size)
    direction = tl.load(vectors + number * vector_stride * chunk + i, mask=(i < size) & (number != 0), other=0.0)
    steered = before.to(tl.float32) + tl.load(coefficient + token) * direction
    tl.store(
        out + token * out_stride * chunk + i, tl.where(number == 0, before, steered.to(before.dtype)), mask=i < size
    )
