"""The position sidecar: the logical position of every token that was ever moved, kept per page.

Between compactions tokens are appended in order, so only slots that a compaction filled need an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.paging import PagedCache


class PositionSidecar:
    """`entries`, int32 `[layers, pages, H, page_size]`, is addressed by the same page ids as the cache."""

    def __init__(self, cache: PagedCache) -> None:
        first = cache.caches[0]
        self.entries = torch.zeros(len(cache.caches), *first.shape[:3], dtype=torch.int32, device=first.device)
        self._read = ops.function("held_positions", first.device)

    def read(self, table: Tensor, length: int, num_placed: Tensor, num_evicted: Tensor) -> Tensor:
        """Logical positions of the tokens of R requests by slot, int32 `[R, layers, H, length]`; for the arguments see
        `ops.batched.held_positions`."""
        held: Tensor = self._read(self.entries, table, num_placed, num_evicted, length)
        return held
