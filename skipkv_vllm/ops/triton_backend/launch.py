"""Shared by the operators in Triton: access to the kernels, checks of pages, and sizes of launches."""

from __future__ import annotations

import importlib.util
import math
import os
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from ..paging import ROTATED, Layout

SCRATCH_BYTES = 256 << 20
"""Scratch memory that an operator may take; more rows take several launches."""


def unavailable(device_type: str) -> str | None:
    """Return why the operators cannot run on a device, and the remedy; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if device_type == "cpu" and not interpreted():
        return "Triton needs a GPU; to test its kernels on a CPU set TRITON_INTERPRET=1"
    return None


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(name: str) -> Any:
    """Import a module of kernels, late, so that this package can be imported without Triton."""
    return import_module(f"..triton_kernels.{name}", __package__)


def element_of(op: str, cache: Tensor, queries: Tensor | None = None) -> Any:
    """Return Triton's type for the elements of a cache.

    Raises:
        KVPolicyError: unsupported dtypes of the cache and the queries.
    """
    tl = import_module("triton.language")
    narrow = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
    elements = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} | narrow
    expected = torch.float32 if cache.dtype in narrow else cache.dtype
    if cache.dtype not in elements or (queries is not None and queries.dtype != expected):
        raise KVPolicyError(
            f"{op}: caches {cache.dtype} and queries {queries.dtype if queries is not None else None}; expected one of "
            "float32, float16 and bfloat16 for both, or float8_e4m3fn or float8_e5m2 and float32; start without "
            "--kv-cache-dtype"
        )
    return elements[cache.dtype]


def check_pages(caches: list[Tensor], layout: int) -> None:
    """Raise `KVPolicyError` unless the kernels can read pages of this layout."""
    if layout not in (Layout.ROWS, Layout.LATENT) or caches[0].stride(3) != 1:
        raise KVPolicyError(
            f"the Triton operators read pages with K and V side by side (layout {Layout.ROWS.value}) and latents "
            f"({Layout.LATENT.value}); got layout {layout} with strides {caches[0].stride()}; set SKIPKV_OPS=torch"
        )


class Cells(NamedTuple):
    """What kernels need to read keys and values.

    Attributes:
        strides: of pages, heads and tokens, in chunks; 0 where there is no next one.
        constants: page size, head size, dtype, elements of a chunk, and columns of a tile; of latents also how many
            features are multiplied at a time.
        key_size, value_size: D, and the features of a value.
        has_latents: whether the kernels are those of latents.
    """

    strides: tuple[int, ...]
    constants: dict[str, Any]
    key_size: int
    value_size: int
    has_latents: bool

    def kernels(self, name: str) -> Any:
        """Import the module of the kernels that read such cells; those for latents have the same arguments."""
        return kernels(f"latent_{name}" if self.has_latents else name)

    def block(self, narrow: int, wide: int, latents: int) -> int:
        """Return how many tokens a tile has: with heads of up to 128 features, with larger ones, and of latents."""
        return latents if self.has_latents else narrow if self.key_size <= 128 else wide


def cells_of(op: str, caches: list[Tensor], layout: int, queries: Tensor | None = None) -> Cells:
    """Return how kernels read caches.

    A chunk is the widest part of a vector, of at most 16 bytes, that divides the head size and all strides and
    addresses. A server's caches stay where they are, so its kernels are compiled for one width.

    Raises:
        KVPolicyError: caches or queries that the kernels cannot read.
    """
    check_pages(caches, layout)
    cache, size, has_latents = caches[0], caches[0].element_size(), layout == Layout.LATENT
    dim, strides = cache.shape[3], [stride_of(cache, dimension) for dimension in range(3)]
    dim = dim if has_latents else dim // 2
    chunk = math.gcd(16 // size, common_chunk(dim, *strides), *(each.data_ptr() // size for each in caches))
    constants = {"page_size": cache.shape[2], "dim": dim, "element": element_of(op, cache, queries), "chunk": chunk}
    value_size = dim - ROTATED if has_latents else dim
    constants["dims"] = max(16, power_of_two(value_size))
    if has_latents:
        constants["width"] = math.gcd(ROTATED, dim)
    return Cells(tuple(stride // chunk for stride in strides), constants, dim, value_size, has_latents)


def stride_of(tensor: Tensor, dimension: int) -> int:
    """Return a stride; 0 for a single entry, whose stride may be any number."""
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0


def common_chunk(*lengths: int) -> int:
    """Return the largest power of two up to 16 that divides all lengths.

    Kernels get strides in units of it, as a constant. So the compiler knows that they are multiples, and reads vectors
    at once, without another compilation for every stride.
    """
    return math.gcd(16, *lengths)


def by_position(positions: Tensor, num_resident: Tensor, first: int, rows_per_request: int) -> Tensor:
    """Return the slots of rows in ascending position, int32 `[rows, n]`; those past the length come last.

    Args:
        positions: int32 `[rows, n]` by slot.
        num_resident: int32 `[R]`.
        first: number of the first of these rows.
        rows_per_request: consecutive rows of a request.
    """
    rows, n = positions.shape
    past = torch.arange(n, device=positions.device) >= num_resident[:, None]
    request = torch.arange(first, first + rows, device=positions.device) // rows_per_request
    return positions.masked_fill(past[request], torch.iinfo(torch.int32).max).argsort(dim=-1).int()


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
