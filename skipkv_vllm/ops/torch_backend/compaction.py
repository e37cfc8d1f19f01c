"""The choice of tokens to keep, their moves within the pages, and their positions afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..paging import Layout, layer_pages


def select_keep(
    scores: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    num_keep: Tensor,
    pin_below: Tensor,
    pin_from: Tensor,
    max_moves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the pinned and the best tokens of every row, exactly `num_keep`, and list the cells to move.

    Of equal scores the lower position stays. Kept tokens in one of the first `num_keep` slots stay in place; the
    others move into the slots of evicted ones, first to first, both in ascending order.

    Args:
        scores: float32 `[R, L, H, N]`, no NaN.
        positions: int32 `[R, L, H, N]`.
        num_resident, num_keep: int32 `[R]`; num_keep <= num_resident.
        pin_below, pin_from: int32 `[R]`; positions below the first or not below the second are pinned. Every row has
            at most `num_keep` of them.
        max_moves: M, at least `min(num_keep, num_resident - num_keep)` of every request.

    Returns:
        `source` and `hole`, int32 `[R, L, H, M]`, and `count`, int32 `[R, L, H]`: for i below count, slot
        `source[i]` moves to `hole[i]`. Both are 0 from count on.
    """
    shape = positions.shape[:-1]
    source = torch.zeros(*shape, max_moves, dtype=torch.int32, device=positions.device)
    hole, count = torch.zeros_like(source), torch.zeros(shape, dtype=torch.int32, device=positions.device)
    lengths = zip(num_resident.tolist(), num_keep.tolist(), strict=True)
    for r, (length, keep) in enumerate(lengths):
        position = positions[r, ..., :length]
        pinned = (position < pin_below[r]) | (position >= pin_from[r])
        order = position.argsort(dim=-1)
        by_position = (scores[r, ..., :length].gather(-1, order), pinned.gather(-1, order))
        kept = torch.zeros_like(pinned).scatter(-1, order, functional.select_per_head(*by_position, keep))
        moved_from, moved_to, valid = functional.move_list(kept, keep)
        moves = valid.shape[-1]
        source[r, ..., :moves] = torch.where(valid, moved_from, 0)
        hole[r, ..., :moves] = torch.where(valid, moved_to, 0)
        count[r] = valid.sum(-1)
    return source, hole, count


def compact_pages(
    caches: list[Tensor],
    pointers: Tensor,
    layout: int,
    sidecar: Tensor,
    positions: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    num_keep: Tensor,
    source: Tensor,
    hole: Tensor,
    count: Tensor,
) -> None:
    """Apply move lists to K and V of all layers and requests, in place, and record the positions.

    First, pages of the target table that differ from those of the source table are copied whole; then cells move, read
    through the source table and written through the target table. No page that one request writes may be read or
    written by another, except that requests may write equal positions to a page that they share. A page that replaces
    another is not among its request's source pages. Cells are copied bit by bit, whatever their dtype.

    Args:
        caches, pointers, layout: the pages.
        sidecar: int32 `[L, pages, H, P]`; afterwards the first `num_keep` slots hold the positions of their tokens.
        positions: int32 `[R, L, H, N]` by slot, before.
        source_table, target_table: int32 `[R, pages]`, before and after; the latter covers `num_keep` tokens.
        num_keep: int32 `[R]`.
        source, hole, count: the moves that `select_keep` returns.
    """
    size = caches[0].shape[2]
    for r, keep in enumerate(num_keep.tolist()):
        used = -(-keep // size)
        old, new = source_table[r].long(), target_table[r, :used].long()
        changed = old[:used] != new
        valid = torch.arange(source.shape[-1], device=source.device) < count[r][..., None]
        moved = torch.where(valid, positions[r].gather(-1, source[r].long()), 0)
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            pages.copy_pages(old[:used][changed], new[changed])
            sidecar[i, new] = _by_page(positions[r, i], keep, sidecar[i, new], size)
            for h in range(cache.shape[1]):
                n = int(count[r, i, h])
                source_slot, hole_slot = source[r, i, h, :n].long(), hole[r, i, h, :n].long()
                pages.move_cells(
                    h, old[source_slot // size], source_slot % size, new[hole_slot // size], hole_slot % size
                )
                sidecar[i, new[hole_slot // size], h, hole_slot % size] = moved[i, h, :n]


def held_positions(sidecar: Tensor, table: Tensor, num_placed: Tensor, num_evicted: Tensor, length: int) -> Tensor:
    """Read the logical positions of the resident tokens of R requests, by slot.

    Args:
        sidecar: int32 `[L, pages, H, P]`, written by `compact_pages`.
        table: int32 `[R, pages]`, padded with any page.
        num_placed: int32 `[R]` leading slots that the last compaction filled.
        num_evicted: int32 `[R]` tokens evicted so far; later slots hold position slot + num_evicted.
        length: resident length of the longest request; entries past a shorter request's length are undefined.

    Returns:
        int32 `[R, L, H, length]`.
    """
    slot = torch.arange(length, dtype=torch.int32, device=sidecar.device)
    by_request = sidecar[:, table.long()].permute(1, 0, 3, 2, 4)  # [R, L, H, pages, P]
    stored = by_request.flatten(3)[..., :length]
    placed, evicted = (x.view(-1, 1, 1, 1) for x in (num_placed, num_evicted))
    return torch.where(slot < placed, stored, slot + evicted)


def _by_page(values: Tensor, length: int, old: Tensor, size: int) -> Tensor:
    """Return the first `length` of `values` `[H, N]` in the shape of `old` `[pages, H, P]`, and the rest of `old`."""
    flat = old.transpose(0, 1).reshape(values.shape[0], -1).clone()
    flat[:, :length] = values[:, :length]
    return flat.view(values.shape[0], -1, size).transpose(0, 1)
