"""Page layouts: every view against a packer that writes one element at a time from the layout's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from skipkv_vllm.core.device import to_device
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import paging
from skipkv_vllm.ops.paging import LayerPages, PagedCache, layer_pages

PAGES, HEADS = 5, 2


def vec_key(offset: int, d: int, size: int, dim: int) -> int:
    """K region first, `[D, size]`."""
    return d * size + offset


def vec_value(offset: int, d: int, size: int, dim: int) -> int:
    """V region after it, `[size, D]`."""
    return size * dim + offset * dim + d


def amx_key(offset: int, d: int, size: int, dim: int) -> int:
    """`[size / 16, D / 2, 16 tokens, 2]`: pairs along D."""
    return ((offset // 16 * (dim // 2) + d // 2) * 16 + offset % 16) * 2 + d % 2


def amx_value(offset: int, d: int, size: int, dim: int) -> int:
    """`[D / 16, size / 2, 16, 2 tokens]`: pairs along tokens."""
    return size * dim + ((d // 16 * (size // 2) + offset // 2) * 16 + d % 16) * 2 + offset % 2


class Layout(NamedTuple):
    """A cache in one layout with the independent packer's address function."""

    layer: LayerPages
    cells: Callable[[int, int], Tensor]
    """flat cell of a page and head, sharing memory with the cache"""
    key: Callable[[int, int, int, int], int]
    value: Callable[[int, int, int, int], int]
    size: int
    dim: int

    def write(self, page: int, head: int, offset: int, key: Tensor, value: Tensor) -> None:
        cell = self.cells(page, head)
        for d in range(self.dim):
            cell[self.key(offset, d, self.size, self.dim)] = key[d]
            cell[self.value(offset, d, self.size, self.dim)] = value[d]

    def read(self, page: int, head: int, offset: int) -> tuple[Tensor, Tensor]:
        cell = self.cells(page, head)
        rows = range(self.dim)
        return (
            torch.stack([cell[self.key(offset, d, self.size, self.dim)] for d in rows]),
            torch.stack([cell[self.value(offset, d, self.size, self.dim)] for d in rows]),
        )

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Write tokens `[pages, H, size, D]` one by one."""
        for page in range(keys.shape[0]):
            for head in range(keys.shape[1]):
                for offset in range(self.size):
                    self.write(page, head, offset, keys[page, head, offset], values[page, head, offset])

    def dump(self) -> tuple[Tensor, Tensor]:
        """All tokens, `[pages, H, size, D]`."""
        keys = torch.zeros(PAGES, HEADS, self.size, self.dim, dtype=self.layer.raw.dtype)
        values = torch.zeros_like(keys)
        for page in range(PAGES):
            for head in range(HEADS):
                for offset in range(self.size):
                    keys[page, head, offset], values[page, head, offset] = self.read(page, head, offset)
        return keys, values


def gpu_layout(order: str, size: int, dim: int, dtype: torch.dtype) -> Layout:
    """The logical `[B, H, N, 2D]` view of a tensor whose dimensions lie in memory in `order`."""
    lengths = {"B": PAGES, "H": HEADS, "N": size, "C": 2 * dim}
    physical = torch.zeros([lengths[name] for name in order], dtype=dtype)
    raw = physical.permute([order.index(name) for name in "BHNC"])
    assert raw.shape == (PAGES, HEADS, size, 2 * dim)

    class Cell:
        def __init__(self, page: int, head: int) -> None:
            self.page, self.head = page, head

        def _index(self, i: int) -> tuple[int, ...]:
            where = {"B": self.page, "H": self.head, "N": i // (2 * dim), "C": i % (2 * dim)}
            return tuple(where[name] for name in order)

        def __getitem__(self, i: int) -> Tensor:
            return physical[self._index(i)]

        def __setitem__(self, i: int, value: Tensor) -> None:
            physical[self._index(i)] = value

    return Layout(
        layer_pages(raw, paging.Layout.ROWS),
        Cell,
        lambda offset, d, size, dim: offset * 2 * dim + d,
        lambda offset, d, size, dim: offset * 2 * dim + dim + d,
        size,
        dim,
    )


def cpu_layout(isa: str, size: int, dim: int, dtype: torch.dtype, head_first: bool = False) -> Layout:
    if head_first:
        raw = torch.zeros(HEADS, PAGES, size, 2 * dim, dtype=dtype).transpose(0, 1)
    else:
        raw = torch.zeros(PAGES, HEADS, size, 2 * dim, dtype=dtype)
    table = (amx_key, amx_value) if isa == "amx" else (vec_key, vec_value)
    return Layout(
        layer_pages(raw, paging.cpu_layout(isa)), lambda page, head: raw[page, head].view(-1), *table, size, dim
    )


LAYOUTS = {
    "gpu BHNC": lambda: gpu_layout("BHNC", 4, 8, torch.float32),
    "gpu BNHC": lambda: gpu_layout("BNHC", 4, 8, torch.bfloat16),
    "gpu HBNC": lambda: gpu_layout("HBNC", 16, 8, torch.float16),
    "gpu NBHC": lambda: gpu_layout("NBHC", 4, 8, torch.float32),
    "cpu vec": lambda: cpu_layout("vec", 16, 8, torch.float32),
    "cpu vec, large": lambda: cpu_layout("vec", 32, 32, torch.float32),
    "cpu vec16": lambda: cpu_layout("vec16", 16, 8, torch.bfloat16),
    "cpu vec, heads outside": lambda: cpu_layout("vec", 16, 8, torch.float32, head_first=True),
    "cpu amx": lambda: cpu_layout("amx", 32, 32, torch.bfloat16),
    "cpu amx, one tile": lambda: cpu_layout("amx", 16, 16, torch.bfloat16),
    "cpu amx, wide": lambda: cpu_layout("amx", 32, 48, torch.float16),
    "cpu amx, heads outside": lambda: cpu_layout("amx", 32, 32, torch.bfloat16, head_first=True),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


@pytest.fixture
def filled(layout) -> tuple[Layout, Tensor, Tensor]:
    """Return a cache full of random tokens, written by the packer."""
    generator = torch.Generator().manual_seed(0)
    shape = (PAGES, HEADS, layout.size, layout.dim)
    keys = torch.randn(shape, generator=generator).to(layout.layer.raw.dtype)
    values = torch.randn(shape, generator=generator).to(layout.layer.raw.dtype)
    layout.fill(keys, values)
    return layout, keys, values


def vectors(layout: Layout, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Return the content of each of the layer's cells for these tokens."""
    return [keys, values] if len(layout.layer.cells) == 2 else [torch.cat([keys, values], -1)]


def test_shapes(layout):
    assert layout.layer.page_size == layout.size
    assert layout.layer.num_heads == HEADS
    assert layout.layer.keys.tile in (1, 2, 16)


def test_the_views_share_memory_with_the_cache(layout):
    for cell in (layout.layer.keys, *layout.layer.cells):
        assert cell.view.untyped_storage().data_ptr() == layout.layer.raw.untyped_storage().data_ptr()


def test_read_pages_in_slot_order(filled):
    layout, keys, _ = filled
    pages = [3, 1, 4]
    for length in (1, layout.size - 1, layout.size, 2 * layout.size + 1, 3 * layout.size):
        got = layout.layer.keys.read_pages(torch.tensor(pages), length)
        wanted = torch.cat([keys[p] for p in pages], dim=1)[:, :length]
        assert torch.equal(got, wanted)


def test_read_pages_is_a_copy(filled):
    layout, keys, _ = filled
    layout.layer.keys.read_pages(torch.tensor([1]), layout.size).zero_()
    assert torch.equal(layout.dump()[0], keys)


def test_gather_single_tokens(filled):
    layout, keys, values = filled
    generator = torch.Generator().manual_seed(1)
    page = torch.randint(0, PAGES, (HEADS, 9), generator=generator)
    offset = torch.randint(0, layout.size, (HEADS, 9), generator=generator)
    head = torch.arange(HEADS)[:, None]
    for cell, content in zip(layout.layer.cells, vectors(layout, keys, values), strict=True):
        got = cell.gather(page, head, offset)
        for h in range(HEADS):
            for i in range(9):
                assert torch.equal(got[h, i], content[page[h, i], h, offset[h, i]])


def test_scatter_writes_these_tokens_and_no_others(filled):
    layout, keys, values = filled
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(PAGES * layout.size, generator=generator)[:7]
    page, offset = (chosen // layout.size).expand(HEADS, -1), (chosen % layout.size).expand(HEADS, -1)
    head = torch.arange(HEADS)[:, None]
    new_keys = torch.randn(HEADS, 7, layout.dim, generator=generator).to(keys.dtype)
    new_values = torch.randn(HEADS, 7, layout.dim, generator=generator).to(keys.dtype)
    for cell, content in zip(layout.layer.cells, vectors(layout, new_keys, new_values), strict=True):
        cell.scatter(page, head, offset, content)
    for h in range(HEADS):
        for i in range(7):
            keys[page[h, i], h, offset[h, i]] = new_keys[h, i]
            values[page[h, i], h, offset[h, i]] = new_values[h, i]
    got_keys, got_values = layout.dump()
    assert torch.equal(got_keys, keys)
    assert torch.equal(got_values, values)


def test_copy_pages_copies_every_byte(filled):
    layout, keys, values = filled
    layout.layer.copy_pages(torch.tensor([1, 4]), torch.tensor([3, 2]))
    keys[[3, 2]], values[[3, 2]] = keys[[1, 4]], values[[1, 4]]
    got_keys, got_values = layout.dump()
    assert torch.equal(got_keys, keys)
    assert torch.equal(got_values, values)


def compact(layout, source_blocks, target_blocks, source, hole, number) -> None:
    """Call the operator for one request and one layer."""
    cache = PagedCache.of([layout.layer.raw], layout.layer.layout)
    moves = [torch.as_tensor(x, dtype=torch.int32)[None, None] for x in (source, hole, number)]
    tables = [torch.as_tensor(pages, dtype=torch.int32)[None] for pages in (source_blocks, target_blocks)]
    sidecar = torch.zeros(1, *layout.layer.raw.shape[:3], dtype=torch.int32)
    positions = torch.arange(len(source_blocks) * layout.size, dtype=torch.int32).expand(1, 1, HEADS, -1).contiguous()
    keep = torch.tensor([len(target_blocks) * layout.size], dtype=torch.int32)
    torch.ops.skipkv.compact_pages(*cache, sidecar, positions, *tables, keep, *moves)


def test_move_tokens_between_pages_per_head(filled):
    layout, keys, values = filled
    size = layout.size
    # Three pages become two, the second of them fresh; head 0 moves three tokens, head 1 one.
    source_blocks, target_blocks = torch.tensor([3, 1, 4]), torch.tensor([3, 2])
    source = torch.tensor([[2 * size, 2 * size + 1, 3 * size - 1], [2 * size + 2, 0, 0]])
    hole = torch.tensor([[0, size - 1, size + 1], [size + 3, 0, 0]])
    compact(layout, source_blocks, target_blocks, source, hole, [3, 1])
    before_keys, before_values = keys.clone(), values.clone()
    # The fresh page takes the content of the one it replaces.
    keys[2], values[2] = keys[1], values[1]
    for h, s, t in (
        (0, 2 * size, 0),
        (0, 2 * size + 1, size - 1),
        (0, 3 * size - 1, size + 1),
        (1, 2 * size + 2, size + 3),
    ):
        old, new = int(source_blocks[s // size]), int(target_blocks[t // size])
        keys[new, h, t % size] = before_keys[old, h, s % size]
        values[new, h, t % size] = before_values[old, h, s % size]
    got_keys, got_values = layout.dump()
    assert torch.equal(got_keys, keys)
    assert torch.equal(got_values, values)


def test_moves_of_padding_only_touch_nothing(filled):
    layout, keys, values = filled
    zeros = torch.zeros(HEADS, 4, dtype=torch.int64)
    compact(layout, [2, 3], [2], zeros + layout.size, zeros, [0, 0])
    got_keys, got_values = layout.dump()
    assert torch.equal(got_keys, keys)
    assert torch.equal(got_values, values)


def test_an_empty_move_list_is_fine(filled):
    layout, keys, _ = filled
    empty = torch.zeros(HEADS, 0, dtype=torch.int64)
    compact(layout, [2], [2], empty, empty, [0, 0])
    assert torch.equal(layout.dump()[0], keys)


def test_an_unknown_cpu_layout_is_refused():
    with pytest.raises(KVPolicyError, match=r"'neon' \(known: vec, vec16, amx\).*--block-size"):
        paging.cpu_layout("neon")


def test_to_device_takes_lists_and_arrays():
    assert to_device([1, 2], torch.int32, torch.device("cpu")).dtype == torch.int32


@pytest.mark.parametrize(("size", "dim"), [(32, 32), (32, 64), (64, 128)])
def test_vec_layout_equals_vllms_writer(size, dim):
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM's CPU attention ops exist in CPU builds only")
    platforms.current_platform.import_kernels()
    from vllm import _custom_ops

    raw = torch.zeros(PAGES, HEADS, size, 2 * dim)
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * size + 3
    keys = torch.randn(tokens, HEADS, dim, generator=generator)
    values = torch.randn(tokens, HEADS, dim, generator=generator)
    slots = torch.randperm(PAGES * size, generator=generator)[:tokens]
    k_cache, v_cache = raw.view(PAGES, HEADS, 2 * size, dim).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, slots, "vec")

    layer = layer_pages(raw, paging.cpu_layout("vec"))
    page, offset, head = slots // size, slots % size, torch.arange(HEADS)[:, None]
    for cell, content in zip(layer.cells, (keys, values), strict=True):
        assert torch.equal(cell.gather(page.expand(HEADS, -1), head, offset.expand(HEADS, -1)), content.transpose(0, 1))
    # Conversely, our scatter writes what vLLM would have written.
    again = torch.zeros_like(raw)
    for cell, content in zip(layer_pages(again, paging.cpu_layout("vec")).cells, (keys, values), strict=True):
        cell.scatter(page.expand(HEADS, -1), head, offset.expand(HEADS, -1), content.transpose(0, 1))
    assert torch.equal(again, raw)


def test_a_latent_is_the_value_of_a_key_that_contains_it():
    raw = torch.arange(3 * 16 * 96.0).view(3, 1, 16, 96)
    pages = layer_pages(raw.clone(), paging.Layout.LATENT)
    used = torch.tensor([2, 0])
    rows = torch.cat([raw[2, 0], raw[0, 0]])[:20]
    assert pages.keys.read_pages(used, 20)[0].equal(rows)
    assert pages.values.read_pages(used, 20)[0].equal(rows[:, : 96 - paging.ROTATED])
    page, offset = torch.tensor([1]), torch.tensor([5])
    pages.move_cells(0, used[:1], offset, page, offset + 1)
    assert pages.raw[1, 0, 6].equal(raw[2, 0, 5])
