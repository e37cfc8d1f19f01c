# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`vector_norms` and `central_tokens` of latents; see `measuring`, whose kernels have the same arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel
from .latents import ROTATED, latents_at, load_latents, load_part
from .measuring import INFINITY, rank_from
from .rows import cells_of, row_of


@kernel()
def measure_vectors(
    pointers,
    table,
    num_resident,
    order,
    weights,
    out,
    first,
    n,
    part,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    skip: tl.constexpr,
    norm: tl.constexpr,
    centred: tl.constexpr,
    ordered: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
):
    """See `measuring.measure_vectors`; a `skip` other than 0 stands for values."""
    latent: tl.constexpr = dim - ROTATED
    parts = tl.cdiv(n, part)
    row = tl.program_id(0) // parts
    begin = tl.program_id(0) % parts * part
    request, layer, head = row_of(first, row, layers, heads)
    last = tl.minimum(begin + part, n)
    end = tl.minimum(last, tl.load(num_resident + request))
    line = (first + row).to(tl.int64) * n
    pages = table + request.to(tl.int64) * table_stride
    centre = tl.zeros([dims], tl.float32)
    rotated_centre = tl.zeros([ROTATED], tl.float32)
    if centred:
        for start in range(begin, end, block):
            rank = start + tl.arange(0, block)
            valid = rank < end
            slot = rank
            if ordered:
                slot = tl.load(order + row.to(tl.int64) * n + rank, mask=valid, other=0)
            cell = cells_of(pages, slot, valid, page_size)
            at = latents_at(
                pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk
            )
            weight = tl.full([block], 1.0, tl.float32)
            if weighted:
                weight = tl.load(weights + line + slot, mask=valid, other=0.0)
            vector = load_latents(at, valid, latent, element, dims).to(tl.float32)
            centre += tl.sum(vector * weight[:, None], axis=0)
            if skip == 0:
                rotated = load_part(at, valid, latent, element, ROTATED).to(tl.float32)
                rotated_centre += tl.sum(rotated * weight[:, None], axis=0)
        if not weighted:
            count = tl.maximum(end - begin, 1).to(tl.float32)
            centre = centre / count
            rotated_centre = rotated_centre / count
    for start in range(begin, last, block):
        rank = start + tl.arange(0, block)
        valid = rank < end
        slot = rank
        if ordered:
            slot = tl.load(order + row.to(tl.int64) * n + rank, mask=rank < last, other=0)
        cell = cells_of(pages, slot, valid, page_size)
        at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
        apart = load_latents(at, valid, latent, element, dims).to(tl.float32) - centre[None, :]
        size = tl.sum(tl.abs(apart) if norm == 1 else apart * apart, axis=1)
        if skip == 0:
            rotated = load_part(at, valid, latent, element, ROTATED).to(tl.float32) - rotated_centre[None, :]
            size += tl.sum(tl.abs(rotated) if norm == 1 else rotated * rotated, axis=1)
        if norm == 2:
            size = tl.sqrt(size)
        tl.store(out + line + slot, tl.where(valid, size, 0.0), mask=rank < last)


@triton.jit
def _tokens_at(
    pointers,
    pages,
    order,
    layer,
    head,
    token,
    valid,
    page_stride,
    head_stride,
    token_stride,
    page_size,
    element,
    chunk,
):
    """Return the addresses of the keys of some ranks `[tokens]`."""
    cell = cells_of(pages, tl.load(order + token, mask=valid, other=0), valid, page_size)
    return latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)


@kernel("centroids")
def choose_central(
    pointers,
    table,
    positions,
    num_resident,
    begin,
    end,
    quota,
    order,
    centroids,
    assigned,
    distance,
    out,
    first,
    n,
    segments,
    longest,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    tie,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    most: tl.constexpr,
    rounds: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
):
    """See `measuring.choose_central`; centroids are `[rows, segments, most, dim]`, moved `width` features at a time."""
    latent: tl.constexpr = dim - ROTATED
    row = tl.program_id(0) // segments
    number = tl.program_id(0) % segments
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    line = (first + row).to(tl.int64) * n
    order += row.to(tl.int64) * n
    low = tl.load(begin + request).to(tl.int64) + number.to(tl.int64) * longest
    high = tl.minimum(low + longest, tl.load(end + request).to(tl.int64))
    start = rank_from(order, positions + line, length, low)
    count = tl.maximum(rank_from(order, positions + line, length, high) - start, 0)
    most_kept = tl.load(quota + request.to(tl.int64) * segments + number)
    order += start
    of_tile = tl.arange(0, block)
    if count <= most_kept:
        for tile in range(0, count, block):
            valid = tile + of_tile < count
            slot = tl.load(order + tile + of_tile, mask=valid, other=0)
            tl.store(out + line + slot, tl.full([block], 1, tl.int8), mask=valid)
        return
    if most_kept <= 0:
        return
    pages = table + request.to(tl.int64) * table_stride
    wanted = tl.minimum(most_kept, most)
    cluster = tl.arange(0, most)
    used = cluster < wanted
    centroids += tl.program_id(0).to(tl.int64) * (most * dim)
    whole = centroids + cluster[:, None] * dim + tl.arange(0, width)[None, :]
    assigned += row.to(tl.int64) * n + start
    distance += row.to(tl.int64) * n + start
    # The first centroids are tokens evenly spread over the segment.
    place = ((2 * cluster + 1).to(tl.int64) * count // (2 * wanted)).to(tl.int32)
    from_place = _tokens_at(
        pointers,
        pages,
        order,
        layer,
        head,
        place,
        used,
        page_stride,
        head_stride,
        token_stride,
        page_size,
        element,
        chunk,
    )
    for f in range(0, dim, width):
        tl.store(whole + f, load_part(from_place, used, f, element, width).to(tl.float32))
    for done in range(rounds + 1):
        # Other threads of this program may have written the centroids.
        tl.debug_barrier()
        for tile in range(0, count, block):
            token = tile + of_tile
            valid = token < count
            at = _tokens_at(
                pointers,
                pages,
                order,
                layer,
                head,
                token,
                valid,
                page_stride,
                head_stride,
                token_stride,
                page_size,
                element,
                chunk,
            )
            key = load_latents(at, valid, latent, element, dims).to(tl.float32)
            rotated = load_part(at, valid, latent, element, ROTATED).to(tl.float32)
            least = tl.full([block], INFINITY, tl.float32)
            nearest = tl.zeros([block], tl.int32)
            d = tl.arange(0, dims)
            for j in range(wanted):
                centroid = centroids + j * dim
                apart = key - tl.load(centroid + d, mask=d < latent, other=0.0)[None, :]
                turned = rotated - tl.load(centroid + latent + tl.arange(0, ROTATED))[None, :]
                square = tl.sum(apart * apart, axis=1) + tl.sum(turned * turned, axis=1)
                nearest = tl.where(square < least, j, nearest)
                least = tl.minimum(square, least)
            tl.store(assigned + token, nearest, mask=valid)
            tl.store(distance + token, least, mask=valid)
        tl.debug_barrier()
        # After the last round the centroids are no longer needed.
        features = tl.where(done < rounds, dim, 0)
        for f in range(0, features, width):
            total = tl.zeros([most, width], tl.float32)
            size = tl.zeros([most], tl.float32)
            for tile in range(0, count, block):
                token = tile + of_tile
                valid = token < count
                at = _tokens_at(
                    pointers,
                    pages,
                    order,
                    layer,
                    head,
                    token,
                    valid,
                    page_stride,
                    head_stride,
                    token_stride,
                    page_size,
                    element,
                    chunk,
                )
                nearest = tl.load(assigned + token, mask=valid, other=-1)
                member = (cluster[:, None] == nearest[None, :]).to(tl.float32)
                size += tl.sum(member, axis=1)
                key = load_part(at, valid, f, element, width).to(tl.float32)
                total = tl.dot(member, key, total, input_precision="ieee")
            centres = tl.load(whole + f)
            tl.store(whole + f, tl.where(size[:, None] > 0, total / tl.maximum(size, 1.0)[:, None], centres))
    closest = tl.full([most], INFINITY, tl.float32)
    for tile in range(0, count, block):
        valid = tile + of_tile < count
        nearest = tl.load(assigned + tile + of_tile, mask=valid, other=-1)
        least = tl.load(distance + tile + of_tile, mask=valid, other=INFINITY)
        own = tl.where(cluster[:, None] == nearest[None, :], least[None, :], INFINITY)
        closest = tl.minimum(closest, tl.min(own, axis=1))
    chosen = tl.full([most], 0, tl.int32) + count
    for tile in range(0, count, block):
        valid = tile + of_tile < count
        nearest = tl.load(assigned + tile + of_tile, mask=valid, other=-1)
        least = tl.load(distance + tile + of_tile, mask=valid, other=INFINITY)
        near = (cluster[:, None] == nearest[None, :]) & (least[None, :] <= closest[:, None] * tie)
        chosen = tl.minimum(chosen, tl.min(tl.where(near, (tile + of_tile)[None, :], count), axis=1))
    found = used & (chosen < count)
    slot = tl.load(order + chosen, mask=found, other=0)
    tl.store(out + line + slot, tl.full([most], 1, tl.int8), mask=found)
