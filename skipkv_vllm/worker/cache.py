"""The KV cache of a worker, and the logical position of every token in it.

Between compactions tokens are appended in order, so only slots that a compaction filled need an entry in the position
sidecar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..core.device import padded, to_device
from ..ops.paging import LayerPages, Layout, PagedCache, layer_pages

SLOT_BYTES = 64
"""Most temporary memory of a compaction or accumulation per slot, layer and kv head."""

QUERY_COPIES = 2
"""Copies of its queries that a launch holds for a moment, while it scales them."""

TEMPORARY_BYTES = 2**28
"""Temporary memory that a launch may take for several requests at once."""

SCRATCH_BYTES = 2**28
"""Most scratch memory of an operator, in every backend."""


def query_bytes(num_layers: int, num_heads: int, key_size: int, element_size: int) -> int:
    """Return the temporary memory of one token's queries in all layers, as operators get them, in bytes.

    Args:
        num_layers, num_heads: layers and query heads of this worker.
        key_size: elements of a key.
        element_size: bytes of each; queries for keys of 8 bits are float32.
    """
    return QUERY_COPIES * num_layers * num_heads * key_size * (4 if element_size == 1 else element_size)


def temporary_bytes(num_layers: int, num_heads: int, longest: int, queries: int = 0) -> int:
    """Return the most memory that compactions and accumulations take for a moment, in bytes.

    One request alone may take more than `TEMPORARY_BYTES`.

    Args:
        num_layers, num_heads: layers and kv heads of this worker.
        longest: most tokens of a request when it is compacted.
        queries: bytes of a request's queries; see `query_bytes`.
    """
    return max(TEMPORARY_BYTES, SLOT_BYTES * num_layers * num_heads * longest + queries) + SCRATCH_BYTES


class Room(NamedTuple):
    """What a launch may hold for several requests at once, so that temporary memory is bounded.

    Attributes:
        slots: most slots, if each request has as many as the longest one.
        query: slots that take as much memory as one token's queries.
    """

    slots: int
    query: float = 0.0

    def holds(self, num_requests: int, longest: int, most_queries: int) -> bool:
        """Return whether there is room for requests of up to so many slots and queries."""
        return num_requests * (longest + self.query * most_queries) <= self.slots


class KVCache:
    """The kernel pages of all layers with their position sidecar.

    Args:
        pages: KV pages of this worker's layers, in model order.
        block_size: tokens of one of vLLM's blocks; a multiple of the kernel page size.
        key_scales: float32 `[layers, H]` by which stored keys must be multiplied, or None for 1.
        read_sink_logits: returns the logits of the attention sinks, float32 `[layers, Hq]`, which are weights of the
            model and may be replaced; None if it has none.
        num_query_heads: query heads of this worker; 0 if no queries are recorded.
        most_pairs: (layer, kv head) pairs of the rank that has most; 0 for those of this one.

    Attributes:
        pages: see above.
        layers: the pages of each layer.
        page_size: tokens of a kernel page.
        key_size: elements of a key.
        block_size: see above.
        room: what a launch may hold.
        device: where the pages are.
        sidecar: int32 `[layers, pages, H, page_size]`, logical positions; addressed by the same page ids as the cache.
        key_scales: see above.
    """

    def __init__(
        self,
        pages: PagedCache,
        block_size: int,
        key_scales: Tensor | None = None,
        read_sink_logits: Callable[[], Tensor] | None = None,
        num_query_heads: int = 0,
        most_pairs: int = 0,
    ) -> None:
        first = pages.caches[0]
        self.pages = pages
        self.layers: list[LayerPages] = [layer_pages(each, pages.layout) for each in pages.caches]
        self.page_size = self.layers[0].page_size
        self.block_size = block_size
        key_size = first.shape[3] if pages.layout is Layout.LATENT else first.shape[3] // 2
        self.key_size = key_size
        pairs = len(pages.caches) * first.shape[1]
        query = query_bytes(len(pages.caches), num_query_heads, key_size, first.element_size())
        # Stages of a pipeline may have unequal numbers of layers. All ranks must split a step's work alike, or what
        # they exchange would not fit together.
        self.room = Room(TEMPORARY_BYTES // (SLOT_BYTES * (most_pairs or pairs)), query / (SLOT_BYTES * pairs))
        self.device = first.device
        self.sidecar = torch.zeros(len(pages.caches), *first.shape[:3], dtype=torch.int32, device=first.device)
        self.key_scales = key_scales
        self._read_sink_logits = read_sink_logits
        self._held_positions = ops.function("held_positions", first.device)

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits of the attention sinks, float32 `[layers, Hq]`; None if the model has none."""
        return None if self._read_sink_logits is None else self._read_sink_logits()

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.pages.caches[0].shape[0] * self.page_size // self.block_size

    def table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Convert the block ids of R requests to kernel page ids, int32 `[R, pages]`, padded with page 0."""
        blocks = padded(rows)
        if (ratio := self.block_size // self.page_size) > 1:
            blocks = (blocks[..., None] * ratio + np.arange(ratio, dtype=np.int32)).reshape(len(rows), -1)
        return to_device(blocks, torch.int32, self.device)

    def positions(self, table: Tensor, length: int, num_placed: Tensor, num_evicted: Tensor) -> Tensor:
        """Return the logical positions of the tokens of R requests by slot, int32 `[R, layers, H, length]`.

        See `held_positions` in `ops` for the arguments.
        """
        held: Tensor = self._held_positions(self.sidecar, table, num_placed, num_evicted, length)
        return held

    def positions_of(self, blocks: Sequence[int], length: int, num_placed: int, num_evicted: int) -> Tensor:
        """Return the logical positions of one request's first `length` tokens, int32 `[layers, H, length]`."""
        placed = to_device([[num_placed], [num_evicted]], torch.int32, self.device)
        return self.positions(self.table([blocks]), length, *placed)[0]

    def keys(self, layer: int, pages: Tensor, length: int) -> Tensor:
        """Return the first `length` keys of a request in these kernel pages, `[H, length, D]` in slot order."""
        held = self.layers[layer].keys.read_pages(pages, length)
        return held if self.key_scales is None else held * self.key_scales[layer, :, None, None]

    def scale_queries(self, queries: Tensor) -> Tensor:
        """Scale queries `[R, layers, n, Hq, D]` so that operators can read the stored keys as they are.

        `q . (scale * k)` is `(scale * q) . k`, and cosines do not depend on the scale.
        """
        if self.pages.caches[0].element_size() == 1:
            queries = queries.float()
        if self.key_scales is None:
            return queries
        group = queries.shape[3] // self.key_scales.shape[1]
        return queries * self.key_scales.repeat_interleave(group, dim=1)[:, None, :, None]
