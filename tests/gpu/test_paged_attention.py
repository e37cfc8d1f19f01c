"""The attention of the small engine against dense attention, so that its own faults are not blamed on compaction.

vLLM's Triton kernel is tested where it was carried (`scripts/gpu_check`): on a GPU, and on a CPU in Triton's
interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.devices import DEVICES
from tests.operators.backends import INTERPRETED
from tests.small_engine import Shape, pages
from tests.small_engine.attention import PagedAttention, triton_kernel
from tests.small_engine.buffers import Buffers, Filling

CASES = [
    pytest.param(device, layout, kernel, id=f"{kernel}-{layout}-{device}".replace(" ", "-"))
    for device in DEVICES
    for kernel in ("torch", "triton")
    for layout in (
        ("rows", "rows by token", "vec") if kernel == "torch" and device == "cpu" else ("rows", "rows by token")
    )
]


def kernel_for(name: str, device: str) -> Callable[..., None] | None:
    if name == "torch":
        return None
    kernel = triton_kernel()
    if isinstance(kernel, str):
        pytest.skip(f"vLLM's kernel was not carried: {kernel}")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1")
    return kernel


def dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last queries `[T, Hq, D]` over K and V `[L, H, D]`, in float64."""
    length, heads, dim = keys.shape
    grouped = queries.double().unflatten(1, (heads, -1))
    logits = torch.einsum("thgd,lhd->thgl", grouped, keys.double()) / dim**0.5
    order = torch.arange(length, device=keys.device)
    future = order > length - len(queries) + torch.arange(len(queries), device=keys.device)[:, None]
    weights = logits.masked_fill(future[:, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("thgl,lhd->thgd", weights, values.double()).flatten(1, 2)


@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 1, 12)], ids=["decoding", "prompts"])
@pytest.mark.parametrize(("device", "layout", "kernel"), CASES)
def test_paged_attention_is_dense_attention(device: str, layout: str, kernel: str, counts: tuple[int, ...]) -> None:
    """In two steps, the second behind shuffled blocks; a graph would add a row of padding."""
    found = kernel_for(kernel, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = Shape(torch.device(device), dtype, layers=1, layout=layout, page_size=16, max_requests=4, max_tokens=64)
    cache, buffers = pages.allocate(shape), Buffers(shape)
    attention = PagedAttention(pages.layers_of(cache)[0], shape, buffers.table_length, found)
    generator = torch.Generator().manual_seed(0)
    held = np.array([20, 3, 33])
    blocks = [[7, 2, 11], [4], [3, 9, 5]]
    total = int(held.sum()) + sum(counts)

    def random(heads: int) -> Tensor:
        return torch.randn(total, heads, shape.head_size, generator=generator).to(device, dtype)

    queries, keys, values = random(shape.query_heads), random(shape.kv_heads), random(shape.kv_heads)
    of_request: list[list[int]] = [[], [], []]
    first = 0
    for number, starts in ((held, np.zeros(3, dtype=np.int64)), (np.array(counts), held)):
        is_decoding = max(number) == 1
        inputs = buffers.take(4 if is_decoding else int(number.sum()), 4 if is_decoding else 3, int(max(number)))
        buffers.fill(Filling(number, starts, np.arange(3), blocks), None, inputs)
        part = slice(first, first + int(number.sum()))
        padding = len(inputs.slots) - int(number.sum())
        query, key, value = (torch.cat([x[part], x[:padding] * 100]) for x in (queries, keys, values))
        out = attention.forward(None, query, key, value, inputs)
        for r in range(3):
            own = range(first, first + int(number[r]))
            of_request[r] += own
            wanted = dense(queries[own], keys[of_request[r]], values[of_request[r]])
            place = first - part.start
            tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(out[place : place + len(own)].double(), wanted, rtol=tolerance, atol=tolerance)
            first += len(own)
