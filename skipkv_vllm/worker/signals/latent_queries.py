"""The query ring of models with latents (MLA), whose keys all query heads share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .queries import QueryRing


class LatentQueryRing(QueryRing):
    """Records queries as the model computes them, and hands them out absorbed: as they meet latents.

    The key of a head is its latent times a matrix `W_UK` of the head, beside features that are rotated by the position.
    A query's product with it is that of the absorbed query, `q W_UK^T`, with the latent (DeepSeek-V2, section 2.1.2).
    An absorbed query has three times as many elements, so only those that score tokens are absorbed.

    Args:
        layers: vLLM's attention layers of this worker.
        **sizes: see `QueryRing`.
    """

    def __init__(self, layers: Sequence[Any], **sizes: Any) -> None:
        super().__init__(
            num_layers=len(layers),
            num_heads=layers[0].num_heads,
            head_size=layers[0].qk_head_dim,
            key_size=layers[0].head_size,
            logit_scales=[layer.scale for layer in layers],
            **sizes,
        )
        self._layers = layers
        for i, layer in enumerate(layers):
            self._hook(i, layer, _recording(type(layer)))  # type: ignore[arg-type]

    def scaled(self, queries: Tensor) -> Tensor:
        """Absorb and scale queries `[R, layers, n, Hq, D]`: `[R, layers, n, Hq, latent + rotated]`."""
        first, num = self._layers[0], queries.shape[2]
        content, rotated = queries.split([first.qk_nope_head_dim, first.qk_rope_head_dim], dim=-1)
        absorbed = queries.new_empty(*queries.shape[:-1], first.head_size)
        absorbed[..., first.kv_lora_rank :] = rotated
        # Layer by layer, because all matrices in one tensor would be a second copy of these weights.
        for i, layer in enumerate(self._layers):
            by_head = content[:, i].flatten(0, 1).transpose(0, 1)
            found = torch.bmm(by_head, layer.W_UK_T).transpose(0, 1)
            absorbed[:, i, ..., : first.kv_lora_rank] = found.unflatten(0, (-1, num))
        # In place, because an absorbed query is large.
        return absorbed if self._factors is None else absorbed.mul_(self._factors)


@functools.cache
def _recording(cls: type) -> type:
    """Return the subclass of an attention layer that records queries; see `queries`.

    Its implementation gets queries of either form, by the kind of the request; the layer gets all of them in one.
    """

    def forward_impl(self: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        ring = self._skipkv_ring
        if ring.recording:
            ring.record(q, ring.index, self._skipkv_entries, None)
        return cls.forward_impl(self, q, *args, **kwargs)  # type: ignore[attr-defined]

    return type(f"Recording{cls.__name__}", (cls,), {"forward_impl": forward_impl})
