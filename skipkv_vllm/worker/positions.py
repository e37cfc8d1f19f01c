"""The position sidecar: the logical position of every token that was ever moved, kept per page.

Between compactions tokens are appended in order, so only slots that a compaction filled need an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .paging import LayerPages


class PositionSidecar:
    """int32 `[layers, pages, H, page_size]`, addressed by the same page ids as the cache."""

    def __init__(self, num_layers: int, like: LayerPages) -> None:
        num_pages, heads, size, _ = like.raw.shape
        self._entries = torch.zeros(num_layers, num_pages, heads, size, dtype=torch.int32, device=like.raw.device)

    @staticmethod
    def bytes_per_token(num_layers: int, num_heads: int) -> int:
        """Device memory per token of the cache."""
        return 4 * num_layers * num_heads

    def read(self, pages: Tensor, length: int, num_placed: int, num_evicted: int) -> Tensor:
        """Logical positions of a request's tokens by slot, int32 `[layers, H, length]`.

        Args:
            pages: int64 page ids of the request.
            length: resident length.
            num_placed: leading slots that the last compaction filled.
            num_evicted: tokens evicted so far; later slots hold position slot + num_evicted.
        """
        layers, _, heads, _ = self._entries.shape
        slot = torch.arange(length, dtype=torch.int32, device=pages.device)
        appended = (slot + num_evicted).expand(layers, heads, length)
        if num_placed == 0:
            return appended.contiguous()
        stored = self._entries[:, pages].transpose(1, 2).reshape(layers, heads, -1)[..., :length]
        return torch.where(slot < num_placed, stored, appended)

    def write(
        self, pages: Tensor, positions: Tensor, num_keep: int, source: Tensor, hole: Tensor, valid: Tensor
    ) -> None:
        """Record the positions after a compaction.

        Args:
            pages: int64 page ids afterwards.
            positions: by slot before it, `[layers, H, L]`.
            num_keep: slots filled afterwards.
            source, hole, valid: the moves, as `ops.move_list` gives them.
        """
        layers, _, heads, size = self._entries.shape
        filled = torch.zeros(layers, heads, pages.shape[0] * size + 1, dtype=torch.int32, device=pages.device)
        filled[..., :num_keep] = positions[..., :num_keep]
        # Padding goes to the extra column.
        filled.scatter_(-1, torch.where(valid, hole, filled.shape[-1] - 1), positions.gather(-1, source))
        self._entries[:, pages] = filled[..., :-1].view(layers, heads, pages.shape[0], size).transpose(1, 2)
