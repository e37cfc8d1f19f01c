"""Formulas of the methods for one kv head, in double precision or in plain integers."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_of(queries: Tensor, keys: Tensor, window: int, pool: int) -> list[float]:
    """Eq. 4: queries `[W, group, D]`, keys `[L, D]`."""
    old = keys.shape[0] - window
    logits = (queries.double() @ keys[:old].double().T / keys.shape[1] ** 0.5).amax(1)
    mean = logits.softmax(-1).mean(0).tolist()
    return [max(mean[max(0, i - pool // 2) : i + pool // 2 + 1]) for i in range(old)]


def redundancy_of(keys: Tensor, threshold: float) -> list[float]:
    """Eq. 5: keys `[L, D]`."""
    unit = keys.double() / (keys.double().norm(dim=-1, keepdim=True) + 1e-8)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for row in cosine:
        similar = [j for j, value in enumerate(row.tolist()) if value > threshold]
        row[similar[-1] if similar else 0] = 0
    return cosine.mean(0).softmax(-1).tolist()


def error_of(query: Tensor, keys: list[Tensor], values: Tensor) -> list[float]:
    """`A^2 |v - o|^2` of one query `[group, D]`, averaged over the group."""
    logits = query.double() @ torch.stack(keys).double().T / query.shape[1] ** 0.5
    weights = logits.softmax(-1)
    distance = (values.double() - (weights @ values.double())[:, None]).square().sum(-1)
    return (weights**2 * distance).mean(0).tolist()


def attention_of(query: Tensor, keys: list[Tensor]) -> list[float]:
    """Attention of one query `[group, D]` to keys `[D]` each, averaged over the group."""
    logits = query.double() @ torch.stack(keys).double().T / query.shape[1] ** 0.5
    return logits.softmax(-1).mean(0).tolist()


def hashed(seed: int, layer: int, head: int, position: int, length: int) -> float:
    """The score of a token under `random`."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    state = mix(length)
    for value in (seed, layer, head, position):
        state = mix((state + value) % 2**32)
    return state / 2**32
