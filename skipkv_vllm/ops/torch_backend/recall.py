"""Tokens in host memory: their way there and back, and what recent queries ask for among them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..paging import LayerPages, Layout, layer_pages


def key_moments(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    """Compute mean and standard deviation of each element of the keys of R requests.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        first, end: int32 `[R]`, slots of the tokens that count, at least one.

    Returns:
        float32 `[2, R, L, H, D]`: means, then standard deviations.
    """
    pages = [layer_pages(cache, Layout(layout)) for cache in caches]
    found = []
    for r, (start, stop) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
        used = table[r, : -(-stop // pages[0].page_size)].long()
        keys = torch.stack([each.keys.read_pages(used, stop)[:, start:].float() for each in pages])
        found.append(torch.stack([keys.mean(2), keys.std(2, correction=0)]))
    return torch.stack(found, dim=1)


def store_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    table: Tensor,
    spans: Tensor,
    stored_table: Tensor,
    centre: Tensor,
    spread: Tensor,
    stored: Tensor,
    signs: Tensor,
    sizes: Tensor,
) -> None:
    """Copy tokens of R requests to the store, in all layers and heads, and sketch their keys.

    A sketch has the sign of each element, after the centre was subtracted, and one size: the mean distance from the
    centre in units of the spread.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        spans: int32 `[R, 3]`: first slot, number of tokens, and place of the first one in the store.
        stored_table: int32 `[R, Q]`, pages of the store.
        centre, spread: float32 `[R, L, H, D]`, of the stored keys of a request.
        stored: `[S, L, H, P, 2 * D]`, the pages of the store, which may lie in host memory; a token's K, then V.
        signs: uint8 `[S, L, H, P, D / 8]`; bit i of byte j is set if element `8 * j + i` is above the centre.
        sizes: float32 `[S, L, H, P]`.
    """
    for r, (first, number, place) in enumerate(spans.tolist()):
        slots = torch.arange(first, first + number, device=table.device)
        places = torch.arange(place, place + number, device=table.device)
        page, offset = _split(table[r], slots, caches[0].shape[2])
        target, within = _split(stored_table[r], places, stored.shape[3])
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            heads = torch.arange(pages.num_heads, device=table.device)
            cells = _read(pages, page[:, None], heads, offset[:, None])
            stored[target, i, :, within] = cells.to(stored.device)
            keys = cells[..., : centre.shape[-1]].float()
            distance = (keys - centre[r, i]) / spread[r, i]
            signs[target, i, :, within] = _packed(distance > 0)
            sizes[target, i, :, within] = distance.abs().mean(-1)


def recall_tokens(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    sidecar: Tensor,
    table: Tensor,
    slots: Tensor,
    places: Tensor,
    first_position: Tensor,
    stored_table: Tensor,
    stored: Tensor,
) -> None:
    """Write stored tokens into slots of R requests, and record their positions.

    Args:
        caches, pointers, layout: the pages.
        sidecar: int32 `[L, pages, H, P]`, positions by slot.
        table: int32 `[R, pages]`.
        slots: int32 `[R, L, H, M]`, different ones in each row.
        places: int32 `[R, L, H, M]`, place in the store of the token for each slot; -1 to leave the slot as it is.
        first_position: int32 `[R]`, position of the token at place 0 of the store.
        stored_table, stored: see `store_tokens`.
    """
    size = caches[0].shape[2]
    for r in range(len(table)):
        page, offset = _split(table[r], slots[r], size)
        is_new = places[r] >= 0
        source, within = _split(stored_table[r], places[r].clamp(min=0), stored.shape[3])
        heads = torch.arange(places.shape[2], device=table.device)[:, None]
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            cells = stored[source[i].to(stored.device), i, heads.to(stored.device), within[i].to(stored.device)]
            at = (page[i], heads, offset[i])
            cells = torch.where(is_new[i, ..., None], cells.to(cache.device), _read(pages, *at))
            start = 0
            for view in pages.cells:
                width = view.view[0, 0, 0, 0].numel()
                view.scatter(*at, cells[..., start : start + width])
                start += width
            positions = first_position[r] + places[r, i]
            noted = (page[i], heads, offset[i])
            sidecar[i][noted] = torch.where(is_new[i], positions, sidecar[i][noted])


def stored_attention(
    signs: Tensor, sizes: Tensor, stored_table: Tensor, number: Tensor, queries: Tensor, length: int
) -> Tensor:
    """Estimate the attention of R requests' queries to their stored tokens, among these, by the sketches of the keys.

    Args:
        signs, sizes, stored_table: see `store_tokens`.
        number: int32 `[R]`, stored tokens of each request.
        queries: `[R, L, W, Hq, D]`, times the spread of the keys.
        length: N, of the longest request.

    Returns:
        float32 `[R, L, H, N]` by place: the largest weight that a query gives to the token, weights averaged over the
        query heads of its group; 0 beyond a request's tokens.
    """
    _, layers, heads, size, width = signs.shape
    found = torch.zeros(len(number), layers, heads, length, dtype=torch.float32, device=signs.device)
    for r, count in enumerate(number.tolist()):
        pages = stored_table[r, : -(-count // size)].long()
        # By page first, as they are stored; then [L, H, count, D / 8] and [L, H, count].
        bits, scale = (x[pages].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :count] for x in (signs, sizes))
        grouped = queries[r].float().unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [L, H, G * W, D]
        logits = grouped / (8 * width) ** 0.5 @ _unpacked(bits).mT * scale[:, :, None]
        weights = logits.softmax(-1).unflatten(2, (-1, queries.shape[2]))
        found[r, ..., :count] = weights.mean(2).amax(2)
    return found


def _split(table: Tensor, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return page and offset of places, int64."""
    places = places.long()
    return table.long()[places // size], places % size


def _read(pages: LayerPages, page: Tensor, head: Tensor, offset: Tensor) -> Tensor:
    """Read tokens with K and V, `[..., 2 * D]`."""
    return torch.cat([view.gather(page, head, offset) for view in pages.cells], dim=-1)


def _packed(bits: Tensor) -> Tensor:
    """Pack bool `[..., D]` into uint8 `[..., D / 8]`."""
    factors = 2 ** torch.arange(8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * factors).sum(-1).to(torch.uint8)


def _unpacked(signs: Tensor) -> Tensor:
    """Return the signs, -1 or 1, float32 `[..., D]`."""
    every = torch.arange(256, device=signs.device)[:, None] >> torch.arange(8, device=signs.device) & 1
    return (every.float() * 2 - 1)[signs.int()].flatten(-2)
