"""The KV cache of the simulation: blocks with reference counts, and the kernel pages of every layer."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from skipkv_vllm.ops.paging import Layout, PagedCache, cpu_layout, layer_pages
from tests.simulation.model import DIM, KV_HEADS


class Pool:
    """Blocks and pages.

    Args:
        layout: "gpu", "gpu strided" or "vec".
        num_layers: layers with a cache.
        num_blocks: block 0 is the null block, as in vLLM.
        page_size: tokens of a kernel page.
        ratio: kernel pages per block.
        chance: chooses among free blocks.

    Attributes:
        raw: the tensors of the layers.
        layers: views of them.
        cache: the same for the runtime.
        free: free blocks.
        references: requests that hold each block.
    """

    def __init__(
        self, layout: str, *, num_layers: int, num_blocks: int, page_size: int, ratio: int, chance: random.Random
    ) -> None:
        self.block_size = page_size * ratio
        self.raw = [self._tensor(layout, num_blocks * ratio, page_size) for _ in range(num_layers)]
        packing = Layout.ROWS if layout.startswith("gpu") else cpu_layout(layout)
        self.layers = [layer_pages(raw, packing) for raw in self.raw]
        self.cache = PagedCache.of(self.raw, packing)
        self.free = list(range(1, num_blocks))
        self.references = dict.fromkeys(range(num_blocks), 0)
        self._ratio = ratio
        self._page_size = page_size
        self._chance = chance

    @staticmethod
    def _tensor(layout: str, pages: int, size: int) -> Tensor:
        if layout == "gpu strided":
            return torch.zeros(pages, size, KV_HEADS, 2 * DIM).transpose(1, 2)
        return torch.zeros(pages, KV_HEADS, size, 2 * DIM)

    # ---- blocks

    def allocate(self) -> int:
        """Take a free block."""
        block = self.free.pop(self._chance.randrange(min(3, len(self.free))))
        assert self.references[block] == 0
        self.references[block] = 1
        return block

    def share(self, blocks: list[int]) -> None:
        """Count another holder of blocks."""
        for block in blocks:
            self.references[block] += 1

    def release(self, block: int) -> None:
        """Count one holder of a block less."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free.insert(0, block)

    # ---- tokens

    def write(self, layer: int, block: int, offset: int, key: Tensor, value: Tensor) -> None:
        """Write K and V `[H, D]` of a token of a block."""
        page = torch.tensor(block * self._ratio + offset // self._page_size)
        self.write_page(layer, page, offset % self._page_size, key, value)

    def write_page(self, layer: int, page: Tensor, offset: int, key: Tensor, value: Tensor) -> None:
        """Write K and V `[H, D]` of a token of a kernel page."""
        cells = self.layers[layer].cells
        content = [torch.cat([key, value], -1)] if len(cells) == 1 else [key, value]
        for cell, vectors in zip(cells, content, strict=True):
            cell.scatter(page, torch.arange(KV_HEADS), torch.tensor(offset), vectors)

    def read(self, layer: int, blocks: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Return K and V of a request by slot, `[H, length, D]` each."""
        slot = torch.arange(length)
        page = torch.tensor(blocks)[slot // self.block_size] * self._ratio + slot % self.block_size // self._page_size
        offset = (slot % self._page_size).expand(KV_HEADS, -1)
        read = [
            cell.gather(page.expand(KV_HEADS, -1), torch.arange(KV_HEADS)[:, None], offset)
            for cell in self.layers[layer].cells
        ]
        return (read[0][..., :DIM], read[0][..., DIM:]) if len(read) == 1 else (read[0], read[1])
