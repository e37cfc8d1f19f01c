"""Measurements of resident tokens that methods build their scores from."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..clusters import central_tokens as central_tokens_of
from ..effects import Effect, attention_effect
from ..paging import LayerPages, Layout, layer_pages


def measure_attention(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    queries: Tensor,
    num_queries: Tensor,
    newest: Tensor,
    sinks: Tensor | None,
    effect: int,
    negligible: float,
) -> Tensor:
    """Sum an effect of every resident token on the attention of the newest queries.

    It is averaged over the query heads of a kv head. A query attends to the resident tokens that are not in its future.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, at least 1 and at most N.
        queries: `[R, L, n, Hq, D]`, post-RoPE, oldest first; of dtype and scale as in `score_tokens`.
        num_queries: int32 `[R]`, how many of the n count, the last ones; 0 to n.
        newest: int32 `[R]`, position of the last query; the others precede it one by one. Every query that counts
            sees at least one resident token.
        sinks: float32 `[L, Hq]`, see `functional.attention_received`; None if there are none.
        effect: one of `Effect`.
        negligible: for `Effect.NEGLIGIBLE`, the share of a query's largest weight below which a weight is negligible.

    Returns:
        float32 `[R, L, H, N]`, not negative; 0 past a request's length.
    """
    sums = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
    lengths = zip(num_resident.tolist(), num_queries.tolist(), newest.tolist(), strict=True)
    for r, (length, number, last) in enumerate(lengths):
        if number == 0:
            continue
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            used = used_pages(table[r], length, pages)
            counted, where = queries[r, i, -number:], positions[r, i, :, :length]
            logits = functional.logits_until(counted, pages.keys.read_pages(used, length), where, last)
            values = pages.values.read_pages(used, length)
            own = None if sinks is None else sinks[i]
            sums[r, i, :, :length] = attention_effect(logits, values, Effect(effect), negligible, own)
    return sums


def key_similarity(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, num_resident: Tensor, length: int
) -> Tensor:
    """Compute the cosine of every resident key with the mean of the resident keys' unit vectors.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        num_resident: int32 `[R]`, at least 1 and at most `length`.
        length: N.

    Returns:
        float32 `[R, L, H, N]`; 0 past a request's length.
    """
    shape = (table.shape[0], len(caches), caches[0].shape[1], length)
    cosines = torch.zeros(shape, dtype=torch.float32, device=table.device)
    for r, number in enumerate(num_resident.tolist()):
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            keys = pages.keys.read_pages(used_pages(table[r], number, pages), number)
            cosines[r, i, :, :number] = functional.key_similarity(keys)
    return cosines


def vector_norms(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    values: bool,
    norm: int,
    part: int,
    weights: Tensor | None,
) -> Tensor:
    """Compute the norm of every resident key or value, or of its distance from a centre.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, at least 1 and at most N.
        values: whether values are read, not keys; both as they are stored, without the scale of a quantised cache.
        norm: 1 or 2.
        part: number of tokens, one after the other in ascending position, that share a centre: their mean. 0 for no
            centre; at least N for one centre of the row.
        weights: float32 `[R, L, H, N]`; the centre is the sum of the part's vectors with these weights instead.

    Returns:
        float32 `[R, L, H, N]`; 0 past a request's length.
    """
    norms = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
    for r, length in enumerate(num_resident.tolist()):
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            held = (pages.values if values else pages.keys).read_pages(used_pages(table[r], length, pages), length)
            order = positions[r, i, :, :length].argsort(dim=-1)
            shares = None if weights is None else weights[r, i, :, :length].gather(-1, order)
            found = functional.vector_norms(held.gather(1, order[..., None].expand(held.shape)), norm, part, shares)
            norms[r, i, :, :length].scatter_(-1, order, found)
    return norms


def pool_neighbours(scores: Tensor, positions: Tensor, num_resident: Tensor, window: int, pool: int) -> Tensor:
    """Replace the score of every resident token by the largest among its neighbours in ascending position.

    Args:
        scores: float32 `[R, L, H, N]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, each above the window and at most N.
        window: number of newest tokens of each row that are neither neighbours nor pooled; they get 0.
        pool: odd number of neighbours, with the token itself.

    Returns:
        float32 `[R, L, H, N]`; minus infinity past a request's length.
    """
    pooled = torch.full(positions.shape, -torch.inf, dtype=torch.float32, device=positions.device)
    for r, length in enumerate(num_resident.tolist()):
        order = positions[r, ..., :length].argsort(dim=-1)
        in_order = scores[r, ..., :length].gather(-1, order).flatten(0, 1)
        found = functional.pooled(in_order, window, pool)
        pooled[r, ..., :length].scatter_(-1, order, found.view(order.shape))
    return pooled


def central_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    begin: Tensor,
    end: Tensor,
    quota: Tensor,
    longest: int,
) -> Tensor:
    """Select the resident tokens whose keys are central to their segment; see `clusters.central_tokens`.

    A segment is a run of positions; how many of its tokens are resident may differ by layer and head.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, at least 1 and at most N.
        begin, end: int32 `[R]`; the first segment begins at the first of these positions, and tokens from the second
            on belong to none.
        quota: int32 `[R, S]`, tokens to select in each segment: at most `clusters.MOST_CLUSTERS`, unless no row has
            more tokens of the segment. Beyond a request's segments any number.
        longest: positions of a segment.

    Returns:
        bool `[R, L, H, N]`; false past a request's length.
    """
    chosen = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    for r, length in enumerate(num_resident.tolist()):
        order = positions[r, ..., :length].argsort(dim=-1)
        places = positions[r, ..., :length].gather(-1, order)
        numbers = (places - begin[r]).div(longest, rounding_mode="floor").clamp(min=-1)
        numbers = torch.where(places < end[r], numbers, quota.shape[1]).long()
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            held = pages.keys.read_pages(used_pages(table[r], length, pages), length).float()
            keys = held.gather(1, order[i, ..., None].expand(held.shape))
            found = central_tokens_of(keys, numbers[i], quota[r].long(), longest)
            chosen[r, i, :, :length].scatter_(-1, order[i], found)
    return chosen


def used_pages(table: Tensor, length: int, pages: LayerPages) -> Tensor:
    """Return the ids of the pages that a request of some length uses."""
    return table[: -(-length // pages.page_size)].long()
