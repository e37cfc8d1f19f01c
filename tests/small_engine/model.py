"""A random decoder with grouped queries and rotary positions, whose every layer can be looked into."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.small_engine.buffers import Inputs
from tests.small_engine.shape import Shape


class Activations(NamedTuple):
    """What a forward pass over T tokens computed.

    Attributes:
        hidden: last hidden states after the final norm, `[T, E]`.
        logits: float32 `[T, V]`.
        queries, outputs: after the rotation, and of attention, `[layers, T, Hq, D]`.
        keys, values: after the rotation, `[layers, T, H, D]`.
    """

    hidden: Tensor
    logits: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor


class Layer(NamedTuple):
    """Weights of a layer: of the fused projection, of the output, and of the MLP."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


class Model:
    """Random weights; equal for equal seeds on any device.

    Args:
        shape: sizes.
        seed: of the weights.
        attention: implementation of each layer, see `PagedAttention`.
    """

    def __init__(self, shape: Shape, seed: int, attention: list[Any]) -> None:
        self._shape, self._attention = shape, attention
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)
            return values.to(shape.device, shape.dtype)

        width, dim = shape.width, shape.head_size
        self._layers = []
        for _ in range(shape.layers):
            qkv = weight((shape.query_heads + 2 * shape.kv_heads) * dim, width)
            # Sharp attention: some tokens matter more than others, as in a trained model.
            qkv[: shape.query_heads * dim] *= 2
            out = weight(width, shape.query_heads * dim)
            self._layers.append(Layer(qkv, out, weight(2 * width, width), weight(width, 2 * width)))
        self._embedding = weight(shape.vocabulary, width, width**0.5)
        self._head = weight(shape.vocabulary, width, 2.0)
        frequencies = 1e4 ** -(torch.arange(0, dim, 2) / dim)
        angles = torch.arange(shape.max_length + 1)[:, None] * frequencies
        self._cos, self._sin = angles.cos().to(shape.device), angles.sin().to(shape.device)

    def forward(self, inputs: Inputs) -> Activations:
        """Run the model; attention writes K and V into the cache and reads it. Works inside graphs."""
        shape = self._shape
        cos, sin = (table[inputs.positions][:, None] for table in (self._cos, self._sin))
        hidden = self._embedding[inputs.token_ids]
        seen: list[tuple[Tensor, ...]] = []
        for layer, attention in zip(self._layers, self._attention, strict=True):
            projected = _normed(hidden) @ layer.qkv.T
            heads = projected.unflatten(1, (-1, shape.head_size))
            query, key, value = heads.split([shape.query_heads, shape.kv_heads, shape.kv_heads], dim=1)
            query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
            out = attention.forward(None, query, key, value, inputs)
            hidden = hidden + out.flatten(1) @ layer.out.T
            hidden = hidden + F.silu(_normed(hidden) @ layer.up.T) @ layer.down.T
            seen.append((query, key, value, out))
        final = _normed(hidden)
        stacked = (torch.stack(each) for each in zip(*seen, strict=True))
        queries, keys, values, outputs = stacked
        return Activations(final, (final @ self._head.T).float(), queries, keys, values, outputs)


def _normed(hidden: Tensor) -> Tensor:
    values = hidden.float()
    return (values * values.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt()).to(hidden.dtype)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)
