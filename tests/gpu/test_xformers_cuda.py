"""A kernel that nobody here wrote attends over compacted pages as dense attention does over the survivors.

`compact_pages` moves survivors to the front of each head's pages; xFormers' paged attention then reads those pages
through the block table, and must see every survivor once and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.ops import batched
from skipkv_vllm.ops.paging import Layout, layer_pages
from tests.op_backends import Backend, on
from tests.op_cases import CompactCase, Compaction, Pages

GROUP = 4


def dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query a head `[H * GROUP, D]` over `[H, n, D]`, in float64."""
    grouped = queries.double().unflatten(0, (keys.shape[0], GROUP))
    weights = (grouped @ keys.double().mT / keys.shape[2] ** 0.5).softmax(-1)
    return (weights @ values.double()).flatten(0, 1)


def paged(fmha: Any, queries: Tensor, cache: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """xFormers' attention of `[R, H * GROUP, D]` over `lengths` tokens of pages `[pages, H, P, 2 * D]`."""
    pages, heads, size, double = cache.shape
    bias = fmha.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * len(lengths), kv_padding=table.shape[1] * size, kv_seqlen=lengths, device=cache.device
    ).make_paged(block_tables=table, page_size=size, paged_type=fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask)
    # [1, tokens, kv heads, query heads of each, D]
    tokens = cache.transpose(1, 2).reshape(1, pages * size, heads, 1, double).expand(-1, -1, -1, GROUP, -1)
    grouped = queries.view(1, len(lengths), heads, GROUP, -1)
    keys, values = tokens.split(double // 2, dim=-1)
    out = fmha.memory_efficient_attention_forward(grouped, keys, values, attn_bias=bias, op=fmha.triton_splitk.FwOp)
    return out.reshape(queries.shape)


def survivors(case: Compaction, r: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens that stay, `[H, keep, D]`, by the list of moves and the pages before."""
    pages = layer_pages(case.caches[layer], Layout.ROWS)
    keep = int(case.num_keep[r])
    slots = torch.arange(keep).repeat(pages.num_heads, 1)
    for h in range(pages.num_heads):
        moves = int(case.count[r, layer, h])
        slots[h, case.hole[r, layer, h, :moves].long()] = case.source[r, layer, h, :moves].long()
    head = torch.arange(pages.num_heads)[:, None]
    page = case.source_table[r, (slots // pages.page_size)].long()
    held = pages.cells[0].gather(page, head, slots % pages.page_size)
    return tuple(held.chunk(2, dim=-1))  # type: ignore[return-value]


def build(dtype: torch.dtype, size: int) -> Compaction:
    case = CompactCase(Pages(dtype=dtype, size=size, heads=2, dim=64), (300, 129, 70), (130, 128, 33)).build()
    generator = torch.Generator().manual_seed(0)
    for cache in case.caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_paged_attention_sees_the_survivors_and_nothing_else(name: str, dtype: torch.dtype, size: int) -> None:
    fmha = pytest.importorskip("xformers.ops", reason="xFormers is not installed: pip install -e '.[xformers]'").fmha
    backend = Backend(name, "cuda")
    if why := backend.module.unavailable("cuda"):
        pytest.skip(f"{name}: {why}")
    before = build(dtype, size)
    after = Compaction(*on("cuda", before.copy()))

    backend.module.compact_pages(*after)

    lengths = before.num_keep.tolist()
    queries = torch.randn(len(lengths), 2 * GROUP, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    table = after.target_table.clamp(min=0)  # what lies past a request's pages is masked, but must be a page
    for layer, cache in enumerate(after.caches):
        got = paged(fmha, queries.cuda(), cache, table, lengths).cpu()
        for r in range(len(lengths)):
            wanted = dense(queries[r], *survivors(before, r, layer))
            torch.testing.assert_close(got[r].double(), wanted, rtol=2e-2, atol=2e-2)


def test_the_expectation_is_what_the_definition_leaves() -> None:
    """Of the test above, what needs neither a GPU nor xFormers."""
    before = build(torch.float32, 16)
    after = before.copy()
    batched.compact_pages(*after)
    for r, keep in enumerate(before.num_keep.tolist()):
        pages = layer_pages(after.caches[1], Layout.ROWS)
        held = pages.cells[0].read_pages(after.target_table[r, : -(-keep // 16)].long(), keep)
        assert torch.equal(held, torch.cat(survivors(before, r, 1), dim=-1))
