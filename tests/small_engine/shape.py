"""The sizes of the small model and of its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skipkv_vllm.sentences import SentenceTables

DOT = 9
"""The token that ends a sentence."""

TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, of the cache and of a step.

    Attributes:
        device, dtype: where the model runs, and the type of its weights and of the cache.
        layers, width, query_heads, kv_heads, head_size, vocabulary: of the model.
        layout: "rows" (pages in memory as `[pages, H, P, 2 * D]`) or "rows by token" (as `[pages, P, H, 2 * D]`), the
            two that GPUs use, or "vec", that of CPUs.
        page_size: P, tokens of a kernel page.
        ratio: kernel pages per block.
        num_blocks: blocks of the pool; block 0 is never given to a request.
        max_requests: requests that run at once.
        max_length: tokens of the longest request.
        max_tokens: tokens of the largest step.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    layers: int = 4
    width: int = 64
    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    vocabulary: int = 64
    layout: str = "rows"
    page_size: int = 8
    ratio: int = 1
    num_blocks: int = 96
    max_requests: int = 8
    max_length: int = 240
    max_tokens: int = 48

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.page_size * self.ratio

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.query_heads // self.kv_heads

    @property
    def graph_sizes(self) -> list[int]:
        """Numbers of requests for which decoding is captured, ascending."""
        return sorted({min(2**i, self.max_requests) for i in range(self.max_requests.bit_length() + 1)})

    def padded(self, num_requests: int) -> int:
        """Return the size of the graph that decodes for so many requests."""
        return next(size for size in self.graph_sizes if size >= num_requests)
