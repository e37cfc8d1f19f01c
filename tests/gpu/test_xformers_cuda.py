"""An independent kernel attends over compacted pages like dense attention over the survivors.

`compact_pages` moves survivors to the front of each head's pages; xFormers' paged attention then reads those pages
through the block table, and must see every survivor once and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.ops import torch_backend
from skipkv_vllm.ops.paging import Layout, layer_pages
from tests.operators.backends import Backend, on
from tests.operators.cases import CompactCase, Compaction, Pages

GROUP = 4


def dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query a head `[H * GROUP, D]` over `[H, n, D]`, in float64."""
    grouped = queries.double().unflatten(0, (keys.shape[0], GROUP))
    weights = (grouped @ keys.double().mT / keys.shape[2] ** 0.5).softmax(-1)
    return (weights @ values.double()).flatten(0, 1)


def xformers_attention() -> Any:
    return pytest.importorskip("xformers.ops", reason="xFormers is not installed: pip install '.[xformers]'").fmha


def bias_of(fmha: Any, table: Tensor, size: int, lengths: list[int]) -> Any:
    """Description of the pages for xFormers: their owners and lengths."""
    kinds = fmha.attn_bias
    padded = kinds.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * len(lengths), kv_padding=table.shape[1] * size, kv_seqlen=lengths, device=table.device
    )
    return padded.make_paged(table, size, kinds.PagedBlockDiagonalPaddedKeysMask)


def tokens_of(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of pages `[pages, H, P, 2 * D]` in the order of memory, `[pages * P, H, D]`."""
    keys, values = cache.transpose(1, 2).flatten(0, 1).chunk(2, dim=-1)
    return keys, values


def paged(op: str, queries: Tensor, cache: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """xFormers' attention of `[R, H * GROUP, D]` over `lengths` tokens of the pages."""
    fmha = xformers_attention()
    operator = getattr(fmha, op).FwOp
    # [1, tokens, kv heads, query heads of each, D]
    keys, values = (x[None, :, :, None].expand(-1, -1, -1, GROUP, -1) for x in tokens_of(cache))
    grouped = queries.view(1, len(lengths), cache.shape[1], GROUP, -1)
    bias = bias_of(fmha, table, cache.shape[2], lengths)
    if why := operator.not_supported_reasons(fmha.Inputs(grouped, keys, values, bias)):
        pytest.skip(f"xFormers' {op}: {'; '.join(why)}")
    try:
        out = fmha.memory_efficient_attention_forward(grouped, keys, values, bias, op=operator)
    except Exception as error:
        if "block pointers have been removed" in repr(error).lower():
            pytest.skip(f"xFormers' {op}: this Triton has no block pointers, which it is written with")
        raise
    return out.reshape(queries.shape)


def survivors(case: Compaction, r: int, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of the survivors, `[H, keep, D]`, from the list of moves and the pages before it."""
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


def queries_of(case: Compaction, dtype: torch.dtype) -> Tensor:
    """A query for each request and query head."""
    shape = (case.num_keep.shape[0], case.caches[0].shape[1] * GROUP, case.caches[0].shape[3] // 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def pages_of(case: Compaction) -> Tensor:
    """Return the block table; entries past a request's pages are masked, but must be valid pages."""
    return case.target_table.clamp(min=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")
# With the page sizes that each of them supports.
@pytest.mark.parametrize(("op", "size"), [("triton_splitk", 64), ("flash", 256), ("flash3", 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_paged_attention_sees_the_survivors_and_nothing_else(name: str, dtype: torch.dtype, op: str, size: int) -> None:
    backend = Backend(name, "cuda")
    if why := backend.module.unavailable("cuda"):
        pytest.skip(f"{name}: {why}")
    before = build(dtype, size)
    after = Compaction(*on("cuda", before.copy()))

    backend.module.compact_pages(*after)

    queries = queries_of(before, dtype)
    for layer, cache in enumerate(after.caches):
        got = paged(op, queries.cuda(), cache, pages_of(after), before.num_keep.tolist()).cpu()
        for r in range(queries.shape[0]):
            wanted = dense(queries[r], *survivors(before, r, layer))
            torch.testing.assert_close(got[r].double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [16, 64])
def test_the_mask_of_a_paged_kernel_shows_the_survivors_and_nothing_else(size: int) -> None:
    """The same on a CPU without a kernel: with the mask that xFormers defines for its kernels."""
    fmha = xformers_attention()
    before = build(torch.float32, size)
    after = before.copy()

    torch_backend.compact_pages(*after)

    lengths, queries = before.num_keep.tolist(), queries_of(before, torch.float32)
    table = pages_of(after)
    tokens = table.shape[1] * size * len(lengths)
    mask = bias_of(fmha, table, size, lengths).materialize((len(lengths), tokens))
    for layer, cache in enumerate(after.caches):
        keys, values = (x[: mask.shape[1]].transpose(0, 1).double() for x in tokens_of(cache))
        for r in range(len(lengths)):
            grouped = queries[r].double().unflatten(0, (keys.shape[0], GROUP))
            weights = (grouped @ keys.mT / keys.shape[2] ** 0.5 + mask[r]).softmax(-1)
            wanted = dense(queries[r], *survivors(before, r, layer))
            torch.testing.assert_close((weights @ values).flatten(0, 1), wanted)


def test_the_expectation_is_what_the_definition_leaves() -> None:
    """The part of the test above that needs neither a GPU nor xFormers."""
    before = build(torch.float32, 16)
    after = before.copy()
    torch_backend.compact_pages(*after)
    for r, keep in enumerate(before.num_keep.tolist()):
        pages = layer_pages(after.caches[1], Layout.ROWS)
        held = pages.cells[0].read_pages(after.target_table[r, : -(-keep // 16)].long(), keep)
        assert torch.equal(held, torch.cat(survivors(before, r, 1), dim=-1))
