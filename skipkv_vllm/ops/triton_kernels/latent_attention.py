# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`measure_attention` and `key_similarity` of latents; see `attention`, whose kernels have the same arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import KEY, NEGLIGIBLE, OUTPUT, SEEN, VALUE
from .kernel import kernel
from .latents import ROTATED, dot_finely, latents_at, load_latents, load_part, products
from .rows import EPSILON, cells_of, row_of


@triton.jit
def _queries_at(queries, request, layer, head, number, q, layers, heads, dim, window, group):
    """Return the addresses of query heads `[tile]`, numbered from the first that counts."""
    every = (window - number) * group + q
    line = ((request * layers + layer).to(tl.int64) * window + every // group) * heads + head
    return queries + (line * group + every % group) * dim


@kernel("queries", "outputs")
def attend_queries(
    pointers,
    table,
    positions,
    num_resident,
    num_queries,
    newest,
    queries,
    sinks,
    top,
    share,
    squares,
    outputs,
    first,
    n,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    root,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    multiply: tl.constexpr,
    effect: tl.constexpr,
    valued: tl.constexpr,
    errors: tl.constexpr,
    sunk: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
):
    """See `attention.attend_queries`; outputs are `[rows, window * group, dim - ROTATED]`."""
    latent: tl.constexpr = dim - ROTATED
    tiles = tl.cdiv(window * group, tile)
    row = tl.program_id(0) // tiles
    begin = tl.program_id(0) % tiles * tile
    request, layer, head = row_of(first, row, layers, heads)
    number = tl.load(num_queries + request)
    if begin >= number * group:
        return
    q = begin + tl.arange(0, tile)
    counts = q < number * group
    query = _queries_at(queries, request, layer, head, number, q, layers, heads, dim, window, group)
    reach = tl.load(newest + request) - (number - 1) + q // group
    length = tl.load(num_resident + request)
    line = (first + row).to(tl.int64) * n
    pages = table + request.to(tl.int64) * table_stride
    highest = tl.full([tile], -float("inf"), tl.float32)
    weight = tl.zeros([tile], tl.float32)
    visible = tl.zeros([tile], tl.float32)
    if errors:
        output = tl.zeros([tile, dims], tl.float32)
    for start in range(0, length, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
        position = tl.load(positions + line + slot, mask=valid, other=0)
        seen = valid[None, :] & (position[None, :] <= reach[:, None])
        logit = products(query, counts, at, valid, dim, element, multiply, width, tile, block) / root
        logit = tl.where(seen, logit, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit, axis=1))
        # Until a query has seen a token there is nothing to subtract.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        part = tl.exp(logit - shift[:, None])
        scale = tl.exp(highest - shift)
        weight = weight * scale + tl.sum(part, axis=1)
        highest = higher
        if effect >= SEEN:
            visible += tl.sum(seen.to(tl.float32), axis=1)
        if errors:
            value = load_latents(at, valid, latent, element, dims).to(multiply)
            output = output * scale[:, None] + dot_finely(part, value, multiply)
    if sunk:
        own = (layer * heads + head) * group + q % group
        weight += tl.exp(tl.load(sinks + own, mask=counts, other=-float("inf")) - highest)
    to = row.to(tl.int64) * (window * group) + q
    tl.store(top + to, highest, mask=counts)
    each = 1.0 / weight
    if effect == SEEN:
        each = visible / weight
    elif effect == NEGLIGIBLE:
        each = 1.0 / visible
    tl.store(share + to, each, mask=counts)
    if errors:
        d = tl.arange(0, dims)
        output = output / weight[:, None]
        tl.store(squares + to, tl.sum(output * output, axis=1), mask=counts)
        tl.store(outputs + to[:, None] * latent + d[None, :], output, mask=counts[:, None] & (d < latent)[None, :])


@kernel("queries", "outputs")
def sum_queries(
    pointers,
    table,
    positions,
    num_resident,
    num_queries,
    newest,
    queries,
    top,
    share,
    squares,
    outputs,
    out,
    first,
    n,
    layers,
    heads,
    table_stride,
    page_stride,
    head_stride,
    token_stride,
    root,
    log_negligible,
    page_size: tl.constexpr,
    dim: tl.constexpr,
    window: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    chunk: tl.constexpr,
    multiply: tl.constexpr,
    effect: tl.constexpr,
    valued: tl.constexpr,
    errors: tl.constexpr,
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
):
    """See `attention.sum_queries`."""
    latent: tl.constexpr = dim - ROTATED
    blocks = tl.cdiv(n, block)
    row = tl.program_id(0) // blocks
    slot = tl.program_id(0) % blocks * block + tl.arange(0, block)
    request, layer, head = row_of(first, row, layers, heads)
    length = tl.load(num_resident + request)
    number = tl.load(num_queries + request)
    valid = slot < length
    line = (first + row).to(tl.int64) * n
    cell = cells_of(table + request.to(tl.int64) * table_stride, slot, valid, page_size)
    at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
    position = tl.load(positions + line + slot, mask=valid, other=0)
    of_value = tl.zeros([block], tl.float32)
    if valued:
        for start in range(0, latent, width):
            value = load_part(at, valid, start, element, width).to(tl.float32)
            of_value += tl.sum(value * value, axis=1)
    sums = tl.zeros([block], tl.float32)
    for begin in range(0, number * group, tile):
        q = begin + tl.arange(0, tile)
        counts = q < number * group
        query = _queries_at(queries, request, layer, head, number, q, layers, heads, dim, window, group)
        to = row.to(tl.int64) * (window * group) + q
        reach = tl.load(newest + request) - (number - 1) + q // group
        seen = counts[:, None] & valid[None, :] & (position[None, :] <= reach[:, None])
        logit = products(query, counts, at, valid, dim, element, multiply, width, tile, block) / root
        peak = tl.load(top + to, mask=counts, other=0.0)[:, None]
        each = tl.load(share + to, mask=counts, other=0.0)[:, None]
        if effect == NEGLIGIBLE:
            attention = tl.where(seen & (logit < peak + log_negligible), each, 0.0)
        else:
            attention = tl.exp(tl.where(seen, logit - peak, -float("inf"))) * each
        if effect == VALUE:
            attention = attention * attention * of_value[None, :]
        if errors:
            mixed = tl.zeros([tile, block], tl.float32)
            for start in range(0, latent, width):
                from_output = outputs + to[:, None] * latent + (start + tl.arange(0, width))[None, :]
                output = tl.load(from_output, mask=counts[:, None], other=0.0)
                value = load_part(at, valid, start, element, width).to(multiply)
                mixed += dot_finely(output, tl.trans(value), multiply)
            of_output = tl.load(squares + to, mask=counts, other=0.0)[:, None]
            # |x v - y o|^2, multiplied out.
            if effect == OUTPUT:
                apart = of_value[None, :] - 2.0 * mixed + of_output
            elif effect == KEY:
                apart = logit * logit * (of_value[None, :] - 2.0 * mixed + of_output)
            else:
                more = logit + 1.0
                apart = more * more * of_value[None, :] - 2.0 * more * logit * mixed + logit * logit * of_output
            attention = attention * attention * tl.maximum(apart, 0.0)
        sums += tl.sum(attention, axis=0)
    tl.store(out + line + slot, tl.where(valid, sums / group, 0.0), mask=slot < n)


@kernel()
def compare_keys(
    pointers,
    table,
    num_resident,
    out,
    n,
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
    block: tl.constexpr,
    dims: tl.constexpr,
    width: tl.constexpr,
):
    """See `attention.compare_keys`."""
    latent: tl.constexpr = dim - ROTATED
    row = tl.program_id(0)
    request, layer, head = row_of(0, row, layers, heads)
    length = tl.load(num_resident + request)
    pages = table + request.to(tl.int64) * table_stride
    mean = tl.zeros([dims], tl.float32)
    rotated_mean = tl.zeros([ROTATED], tl.float32)
    for start in range(0, length, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
        key = load_latents(at, valid, latent, element, dims).to(tl.float32)
        rotated = load_part(at, valid, latent, element, ROTATED).to(tl.float32)
        scale = 1.0 / (tl.sqrt(tl.sum(key * key, axis=1) + tl.sum(rotated * rotated, axis=1)) + EPSILON)
        mean += tl.sum(key * scale[:, None], axis=0)
        rotated_mean += tl.sum(rotated * scale[:, None], axis=0)
    mean = mean / length.to(tl.float32)
    rotated_mean = rotated_mean / length.to(tl.float32)
    size = tl.sqrt(tl.sum(mean * mean, axis=0) + tl.sum(rotated_mean * rotated_mean, axis=0)) + EPSILON
    mean = mean / size
    rotated_mean = rotated_mean / size
    for start in range(0, n, block):
        slot = start + tl.arange(0, block)
        valid = slot < length
        cell = cells_of(pages, slot, valid, page_size)
        at = latents_at(pointers, layer, head, cell, page_stride, head_stride, token_stride, page_size, element, chunk)
        key = load_latents(at, valid, latent, element, dims).to(tl.float32)
        rotated = load_part(at, valid, latent, element, ROTATED).to(tl.float32)
        scale = 1.0 / (tl.sqrt(tl.sum(key * key, axis=1) + tl.sum(rotated * rotated, axis=1)) + EPSILON)
        cosine = tl.sum(key * mean[None, :], axis=1) + tl.sum(rotated * rotated_mean[None, :], axis=1)
        tl.store(out + row.to(tl.int64) * n + slot, tl.where(valid, cosine * scale, 0.0), mask=slot < n)
