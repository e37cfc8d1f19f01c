"""Scores of resident tokens, and the queries that they are computed from."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..paging import LayerPages, Layout, layer_pages


def record_queries(query: Tensor, index: Tensor, ring: Tensor) -> None:
    """Copy each token's query to its row of the ring.

    Args:
        query: `[T, Hq, D]`.
        index: int64 `[>= T]`, row of each token; tokens may share the discard row only, which is never read.
        ring: `[rows, Hq, D]` in the dtype of the query.
    """
    ring.index_copy_(0, index[: query.shape[0]], query)


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
            by_slot = pages.keys.read_pages(_used(table[r], length, pages), length)
            order = positions[r, i, :, :length].argsort(dim=-1)
            keys = by_slot.gather(1, order[..., None].expand(by_slot.shape)).transpose(0, 1)
            score = -(1 - mix) * functional.redundancy(keys, threshold=threshold)
            score[:, length - window :] = 0
            score[:, : length - window] += mix * functional.importance(queries[r, i], keys, window=window, pool=pool)
            scores[r, i, :, :length].scatter_(1, order, score)
    return scores if penalty is None else scores - penalty


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
    output_error: bool,
) -> Tensor:
    """Sum the effect of every resident token on the attention of the newest queries.

    With attention A, value v and output o of a query, the effect is A, or with `output_error` `A^2 |v - o|^2`: the
    change of the output without the token, squared and to first order. It is averaged over the query heads of a kv
    head. A query attends to the resident tokens that are not in its future.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, distinct within a row.
        num_resident: int32 `[R]`, at least 1 and at most N.
        queries: `[R, L, n, Hq, D]`, post-RoPE, oldest first; of dtype and scale as in `score_tokens`.
        num_queries: int32 `[R]`, how many of the n count, the last ones; 0 to n.
        newest: int32 `[R]`, position of the last query; the others precede it one by one. Every query that counts
            sees at least one resident token.
        output_error: see above.

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
            used = _used(table[r], length, pages)
            counted, where = queries[r, i, -number:], positions[r, i, :, :length]
            logits = functional.logits_until(counted, pages.keys.read_pages(used, length), where, last)
            attention = logits.softmax(dim=-1)
            if output_error:
                sums[r, i, :, :length] = functional.output_error(attention, pages.values.read_pages(used, length))
            else:
                sums[r, i, :, :length] = attention.sum(dim=2).mean(dim=1)
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
            keys = pages.keys.read_pages(_used(table[r], number, pages), number)
            cosines[r, i, :, :number] = functional.key_similarity(keys)
    return cosines


def _used(table: Tensor, length: int, pages: LayerPages) -> Tensor:
    """Return the ids of the pages that a request of some length uses."""
    return table[: -(-length // pages.page_size)].long()
