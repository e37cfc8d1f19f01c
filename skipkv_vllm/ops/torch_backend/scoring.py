"""Scores of resident tokens, and the queries that they are computed from."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..paging import Layout, layer_pages
from .measuring import used_pages


def record_queries(query: Tensor, index: Tensor, ring: Tensor, scale: Tensor | None) -> None:
    """Copy each token's query to its row of the ring.

    Args:
        query: `[T, Hq, D]`, in the dtype of the ring, or float8_e4m3fn or float8_e5m2.
        index: int64 `[>= T]`, row of each token. Tokens may share the last row only. It is nobody's, the discard row:
            what it holds afterwards is arbitrary, so that backends need not write it.
        ring: `[rows, Hq, D]`, float32, float16 or bfloat16; rows are contiguous.
        scale: float32, of any shape: what a query of 8 bits is multiplied by, in float32, before it is rounded to the
            ring's dtype; one number, or one for each group of consecutive query heads. None for other queries.
    """
    seen = query if scale is None else functional.dequantised(query, scale).to(ring.dtype)
    ring.index_copy_(0, index[: query.shape[0]], seen)


def score_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    queries: Tensor,
    penalty: Tensor | None,
    pool: int,
    mix: float,
    threshold: float,
) -> Tensor:
    """Compute `mix * importance - (1 - mix) * redundancy - penalty` of every resident token (R-KV; SkipKV eq. 6).

    Tokens are taken in ascending position, whatever their slots. The W newest are pinned and score `-penalty`.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, each above W and at most N.
        queries: `[R, L, W, Hq, D]`, post-RoPE, in the dtype of the cache; float32 for caches of 8 bits. Keys are read
            as they are stored, so the queries must include the scale of a quantised cache.
        penalty: float32 `[R, L, H, N]`, or None for zero.
        pool: odd width of the max-pooling of importance.
        mix: weight of importance against redundancy.
        threshold: key cosine above which the last similar key is exempted.

    Returns:
        float32 `[R, L, H, N]`; minus infinity past a request's length.
    """
    scores = torch.full(positions.shape, -torch.inf, dtype=torch.float32, device=positions.device)
    window = queries.shape[2]
    for r, length in enumerate(num_resident.tolist()):
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            by_slot = pages.keys.read_pages(used_pages(table[r], length, pages), length)
            order = positions[r, i, :, :length].argsort(dim=-1)
            keys = by_slot.gather(1, order[..., None].expand(by_slot.shape)).transpose(0, 1)
            score = -(1 - mix) * functional.redundancy(keys, threshold=threshold)
            score[:, length - window :] = 0
            score[:, : length - window] += mix * functional.importance(queries[r, i], keys, window=window, pool=pool)
            scores[r, i, :, :length].scatter_(1, order, score)
    return scores if penalty is None else scores - penalty
