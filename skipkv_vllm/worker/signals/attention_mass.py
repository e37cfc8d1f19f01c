"""Sums over the queries of a request for every token that it holds, for methods that add them up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROWTH = 256
"""Tokens by which a buffer grows."""


class AttentionSums:
    """float32 `[K, layers, H, capacity]` per running request: K sums by slot, growing with what the request holds.

    They are kept by request and not by page, because requests that share a page attend to it differently.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def forget(self, row: int) -> None:
        """The request in this state row ended or starts over."""
        self._sums.pop(row, None)

    def add(self, row: int, found: Sequence[Tensor]) -> None:
        """Count K tensors `[layers, H, length]`, float32 or integer, of the tokens in the first `length` slots."""
        length = found[0].shape[-1]
        for total, part in zip(self._sized(row, len(found), found[0]), found, strict=True):
            total[..., :length] += part

    def read(self, row: int, count: int, like: Tensor) -> Tensor:
        """The K = `count` sums by slot, each of the shape of `like` `[layers, H, length]`; 0 where none was counted."""
        return self._sized(row, count, like)[..., : like.shape[-1]]

    def move(self, row: int, num_keep: int, source: Tensor, target: Tensor, decay: float) -> None:
        """Follow a compaction, then multiply by `decay`.

        Args:
            row: state row of the request.
            num_keep: sums that stay; those behind them are cleared for the tokens to come.
            source, target: int64 `[layers, H, M]`, the moves; one whose target is `num_keep` is none.
        """
        sums = self._sums[row]
        source, target = (x.expand(sums.shape[0], *x.shape) for x in (source, target))
        sums.scatter_(-1, target, sums.gather(-1, source))
        sums[..., num_keep:] = 0
        if decay != 1.0:
            sums *= decay

    def _sized(self, row: int, count: int, like: Tensor) -> Tensor:
        held, length = self._sums.get(row), like.shape[-1]
        if held is None or held.shape[-1] < length:
            capacity = (length // GROWTH + 1) * GROWTH
            grown = torch.zeros(count, *like.shape[:-1], capacity, dtype=torch.float32, device=like.device)
            if held is not None:
                grown[..., : held.shape[-1]] = held
            self._sums[row] = held = grown
        return held
