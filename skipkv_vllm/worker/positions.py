"""The position sidecar: the logical position of every token that was ever moved, kept per page.

Between compactions tokens are appended in order, so only slots that a compaction filled need an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.paging import PagedCache


class PositionSidecar:
    """`entries`, int32 `[layers, pages, H, page_size]`, is addressed by the same page ids as the cache."""

    def __init__(self, cache: PagedCache) -> None:
        first = cache.caches[0]
        self.entries = torch.zeros(len(cache.caches), *first.shape[:3], dtype=torch.int32, device=first.device)

    def read(self, table: Tensor, length: int, num_placed: Tensor, num_evicted: Tensor) -> Tensor:
        """Logical positions of the tokens of R requests by slot, int32 `[R, layers, H, length]`.

        Args:
            table: integer `[R, pages]` page ids, padded with any page.
            length: resident length of the longest request; what lies past a shorter one's means nothing.
            num_placed: `[R]` leading slots that the last compaction filled.
            num_evicted: `[R]` tokens evicted so far; later slots hold position slot + num_evicted.
        """
        slot = torch.arange(length, dtype=torch.int32, device=table.device)
        by_request = self.entries[:, table.long()].permute(1, 0, 3, 2, 4)  # [R, layers, H, pages, page_size]
        stored = by_request.flatten(3)[..., :length]
        placed, evicted = (x.to(torch.int32).view(-1, 1, 1, 1) for x in (num_placed, num_evicted))
        return torch.where(slot < placed, stored, slot + evicted)
