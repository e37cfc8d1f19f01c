"""The paged cache of the small engine, in the layouts of GPUs and of CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from skipkv_vllm.ops.paging import LayerPages, Layout, PagedCache, cpu_layout, layer_pages
from tests.small_engine.shape import Shape


def allocate(shape: Shape) -> PagedCache:
    """Return pages full of garbage, one tensor a layer."""
    number = shape.num_blocks * shape.ratio
    memory = [number, shape.kv_heads, shape.page_size, 2 * shape.head_size]
    caches = []
    for _ in range(shape.layers):
        if shape.layout == "rows by token":
            memory[1:3] = shape.page_size, shape.kv_heads
        pages = torch.full(memory, 1e4, dtype=shape.dtype, device=shape.device)
        caches.append(pages.transpose(1, 2) if shape.layout == "rows by token" else pages)
    return PagedCache.of(caches, Layout.ROWS if shape.layout.startswith("rows") else cpu_layout(shape.layout))


def layers_of(cache: PagedCache) -> list[LayerPages]:
    """Return the pages of each layer."""
    return [layer_pages(each, cache.layout) for each in cache.caches]


class PageWriter:
    """Writes the tokens of a step into the pages of a layer; works inside graphs.

    Args:
        pages: of the layer.
    """

    def __init__(self, pages: LayerPages) -> None:
        self._pages = pages
        self._head = torch.arange(pages.num_heads, device=pages.raw.device)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write K and V `[T, H, D]` of tokens into their slots, int64 `[T]`."""
        page, offset = (x[:, None] for x in (slots // self._pages.page_size, slots % self._pages.page_size))
        if len(self._pages.cells) == 1:
            self._pages.cells[0].scatter(page, self._head, offset, torch.cat([key, value], dim=-1))
            return
        self._pages.keys.scatter(page, self._head, offset, key)
        self._pages.values.scatter(page, self._head, offset, value)


class PageReader:
    """Reads all tokens of some block tables; works inside graphs.

    Args:
        pages: of the layer.
        length: tokens that a table has room for.
    """

    def __init__(self, pages: LayerPages, length: int) -> None:
        self._pages = pages
        slot = torch.arange(length, device=pages.raw.device)
        self._index, self._offset = slot // pages.page_size, slot % pages.page_size
        self._head = torch.arange(pages.num_heads, device=pages.raw.device)[:, None]

    def read(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V `[R, H, length, D]` of R tables of kernel pages, int32 `[R, pages]`."""
        page = table.long()[:, self._index][:, None]
        keys, values = (view.gather(page, self._head, self._offset) for view in (self._pages.keys, self._pages.values))
        return keys, values
