# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""Shared by the kernels that read latents (MLA), which are too wide for a tile of whole vectors.

A key of `dim` features is a latent, which is the value, and `ROTATED` features behind it. Products take `width`
features at a time, a power of two that divides both. Sums of vectors are collected in a tile of `dims` columns for the
latent, and another one for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import of_bits

ROTATED = tl.constexpr(64)
"""`paging.ROTATED`"""


@triton.jit
def latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk):
    """Return the addresses of cells `[cells]`; strides count chunks of `chunk` elements."""
    # Load the bits, because compilers for older GPUs refuse the type itself.
    stored: tl.constexpr = tl.uint8 if element.primitive_bitwidth == 8 else element
    address = tl.load(pointers + layer).to(tl.pointer_type(stored))
    base = tl.multiple_of(address, chunk * (element.primitive_bitwidth // 8)) + head.to(tl.int64) * head_stride * chunk
    offset = (cell // page_size).to(tl.int64) * page_stride + (cell % page_size).to(tl.int64) * token_stride
    return base + offset * chunk


@triton.jit
def load_part(at, valid, begin, element, width):
    """Load `width` features of keys from `begin` on, `[cells, width]`; zero for cells that are not valid.

    Those of 8 bits become float16, which represents them exactly.
    """
    d = begin + tl.arange(0, width)
    return of_bits(tl.load(at[:, None] + d[None, :], mask=valid[:, None], other=0), element)


@triton.jit
def load_latents(at, valid, latent, element, dims):
    """Load the first `latent` features of keys, which are the values, `[cells, dims]`; zero outside."""
    d = tl.arange(0, dims)
    inside = valid[:, None] & (d < latent)[None, :]
    return of_bits(tl.load(at[:, None] + d[None, :], mask=inside, other=0), element)


@triton.jit
def products(queries, counts, at, valid, dim, element, multiply, width, tile, block):
    """Multiply queries at addresses `[tile]` with keys at addresses `[block]`: float32 `[tile, block]`."""
    product = tl.zeros([tile, block], tl.float32)
    for begin in range(0, dim, width):
        d = begin + tl.arange(0, width)
        query = tl.load(queries[:, None] + d[None, :], mask=counts[:, None], other=0.0).to(multiply)
        key = load_part(at, valid, begin, element, width).to(multiply)
        product = tl.dot(query, tl.trans(key), product, input_precision="ieee")
    return product


@triton.jit
def dot_finely(a, b, multiply):
    """Multiply float32 `a` with `b`, whose dtype is `multiply`, without rounding `a` to that dtype."""
    high = a.to(multiply)
    product = tl.dot(high, b, input_precision="ieee")
    if multiply != tl.float32:
        product = tl.dot((a - high.to(tl.float32)).to(multiply), b, product, input_precision="ieee")
    return product
