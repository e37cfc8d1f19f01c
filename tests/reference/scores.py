"""Token scores of a layer, all kv heads at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MIX = 0.1
SIMILAR_KEYS = 0.5
POOL_KERNEL = 7
EPSILON = 1e-8
HASH_STEPS = ((16, 0x21F0AAAD), (15, 0x735A2D97))


def importance(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that the window pays to each older token.

    Args:
        queries: `[Hq, W, D]`.
        keys: `[heads, held, D]`.

    Returns:
        `[heads, held - W]`.
    """
    num_heads, num_held, size = keys.shape
    window = queries.shape[1]
    grouped = queries.view(num_heads, -1, window, size)
    logits = torch.einsum("hgwd,hkd->hgwk", grouped, keys) / size**0.5
    attention = logits.amax(dim=1)[..., : num_held - window].float().softmax(-1)
    return F.max_pool1d(attention.mean(dim=1), POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)


def redundancy(keys: Tensor) -> Tensor:
    """How much each key `[heads, held, D]` repeats others; `[heads, held]`, sums to one per head."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + EPSILON)
    similarity = unit @ unit.mT
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    num_held = keys.shape[1]
    columns = torch.arange(num_held).expand_as(similarity)
    # The last similar column of each row does not count: the newest copy of a repeated token is not redundant.
    last = torch.where(similarity > SIMILAR_KEYS, columns, 0).amax(-1, keepdim=True)
    similarity.scatter_(-1, last, 0.0)
    return similarity.mean(dim=-2).softmax(-1)


def rkv_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """R-KV score of each held token of a layer, `[heads, held]`; 0 for the window, which is pinned."""
    important = importance(queries, keys)
    num_old = important.shape[1]
    old = MIX * important - (1 - MIX) * redundancy(keys)[:, :num_old]
    return F.pad(old, (0, keys.shape[1] - num_old))


def snapkv_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the window's queries `[Hq, W, D]` to each held token `[heads, held, D]`, causal, pooled."""
    num_heads, num_held, size = keys.shape
    window = queries.shape[1]
    total = torch.zeros(num_heads, num_held)
    for head in range(num_heads):
        group = queries.view(num_heads, -1, window, size)[head]
        for i in range(window):
            seen = num_held - window + i + 1
            weights = (group[:, i] @ keys[head, :seen].T / size**0.5).softmax(-1)
            total[head, :seen] += weights.mean(dim=0)
    pooled = F.max_pool1d(total[None, :, : num_held - window], POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)[0]
    return F.pad(pooled, (0, window))


def hashed(number: int) -> int:
    """A 32-bit integer hash."""
    for shift, multiplier in HASH_STEPS:
        number = (number ^ number >> shift) * multiplier % 2**32
    return number ^ number >> 15


def random_scores(positions: Tensor, num_computed: int, layers: Sequence[int]) -> Tensor:
    """The documented random numbers of `[layers, heads, held]` positions in these layers, by plain integers."""
    scores = []
    for layer, heads in zip(layers, positions.tolist(), strict=True):
        for head, held in enumerate(heads):
            for position in held:
                state = hashed(num_computed)
                for value in (0, layer, head, position):
                    state = hashed((state + value) % 2**32)
                scores.append(state / 2**32)
    return torch.tensor(scores).view(positions.shape)
