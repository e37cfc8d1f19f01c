"""Select the tokens that stay by their scores: exactly as many as ordered, the same on every run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.functional import select_per_head

__all__ = ["select_per_head", "select_sentences"]


def select_sentences(scores: Tensor, pinned: Tensor, sentence: Tensor, num_keep: int) -> Tensor:
    """Evict whole sentences, the same for all layers and heads (granularity "sentence").

    A sentence's score is the mean over its held, unpinned tokens. The sentences with the lowest scores leave; ties
    leave in order. The last sentence to leave loses only its earliest tokens, so that exactly `num_keep` tokens stay.

    Args:
        scores: `[L]`, mean over all layers and heads; higher scores are kept longer.
        pinned: bool `[L]`, tokens that stay; at most `num_keep`.
        sentence: int64 `[L]`, sentence number of each token, ascending.
        num_keep: tokens to keep.

    Returns:
        bool `[L]` with exactly `num_keep` true.
    """
    starts = torch.ones_like(pinned)
    starts[1:] = sentence[1:] != sentence[:-1]
    group = starts.long().cumsum(0) - 1
    free = (~pinned).float()
    total = torch.zeros_like(scores).index_add_(0, group, scores * free)
    count = torch.zeros_like(scores).index_add_(0, group, free)
    worth = (total / count.clamp(min=1))[group].masked_fill(pinned, torch.inf)
    leaving = worth.sort(stable=True).indices[: worth.shape[0] - num_keep]
    return torch.ones_like(pinned).scatter(0, leaving, False)
