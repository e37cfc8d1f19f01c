# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`select_keep`: the exact best K of every row and the moves that bring them to the front; one program a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import kernel


@triton.jit
def _ranking(scores, positions, slot, length, below, start):
    """Return distinct integers that rise with the score and, among equal scores, fall with the position.

    63 bits: 32 of the score in an order-preserving form, then 31 of the inverted position. 0 past the length.
    """
    valid = slot < length
    position = tl.load(positions + slot, mask=valid, other=0)
    score = tl.load(scores + slot, mask=valid, other=0.0)
    score = tl.where((position < below) | (position >= start), float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    # Minus zero equals zero. Comparing floats might also treat subnormal numbers as zero.
    bits = tl.where(bits << 1 == 0, 0, bits)
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ranking = ((signed.to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - position.to(tl.int64))
    return tl.where(valid, ranking, 0)


@kernel()
def select_rows(
    scores,
    positions,
    num_resident,
    num_keep,
    pin_below,
    pin_from,
    source,
    hole,
    count,
    n,
    rows_per_request,
    max_moves,
    block: tl.constexpr,
):
    """See `torch_backend.select_keep`; all tensors as there, contiguous."""
    row = tl.program_id(0)
    request = row // rows_per_request
    length = tl.load(num_resident + request)
    keep = tl.load(num_keep + request)
    below = tl.load(pin_below + request)
    start = tl.load(pin_from + request)
    scores += row.to(tl.int64) * n
    positions += row.to(tl.int64) * n
    source += row.to(tl.int64) * max_moves
    hole += row.to(tl.int64) * max_moves

    # The highest bound that at least K tokens reach, bit by bit; done as soon as exactly K reach it.
    zero = (keep * 0).to(tl.int64)
    bound = zero
    bit = zero + 62
    reached = length
    while (bit >= 0) & (reached != keep):
        trial = bound | ((zero + 1) << bit)
        reaching = tl.zeros([block], tl.int32)
        for first in range(0, length, block):
            slot = first + tl.arange(0, block)
            reaching += (_ranking(scores, positions, slot, length, below, start) >= trial).to(tl.int32)
        found = tl.sum(reaching, axis=0)
        bound = tl.where(found >= keep, trial, bound)
        reached = tl.where(found >= keep, found, reached)
        bit -= 1

    sources = keep * 0
    holes = keep * 0
    for first in range(0, length, block):
        slot = first + tl.arange(0, block)
        kept = _ranking(scores, positions, slot, length, below, start) >= bound
        from_here = (kept & (slot >= keep) & (slot < length)).to(tl.int32)
        into_here = ((kept == 0) & (slot < keep)).to(tl.int32)
        at = sources + tl.cumsum(from_here, axis=0) - 1
        tl.store(source + at, slot, mask=(from_here > 0) & (at < max_moves))
        at = holes + tl.cumsum(into_here, axis=0) - 1
        tl.store(hole + at, slot, mask=(into_here > 0) & (at < max_moves))
        sources += tl.sum(from_here, axis=0)
        holes += tl.sum(into_here, axis=0)
    tl.store(count + row, sources)
    for first in range(0, max_moves, block):
        at = first + tl.arange(0, block)
        unused = (at >= sources) & (at < max_moves)
        tl.store(source + at, tl.zeros([block], tl.int32), mask=unused)
        tl.store(hole + at, tl.zeros([block], tl.int32), mask=unused)
