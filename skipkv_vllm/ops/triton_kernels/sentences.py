# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`track_sentences`, one program a request, and `sentence_similarity`, new sentences against all earlier ones."""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel

EPSILON = tl.constexpr(1e-8)


@kernel("hidden", "open_sum", "embeddings")
def track(
    token_ids,
    hidden,
    spans,
    delimiters,
    ends,
    count,
    after_delimiter,
    open_length,
    open_sum,
    embeddings,
    text,
    requests,
    hidden_stride,
    ends_stride,
    held,
    longest,
    chunk: tl.constexpr,
    width: tl.constexpr,
    merge: tl.constexpr,
    embeds: tl.constexpr,
    keeps_text: tl.constexpr,
    tokens: tl.constexpr,
    block: tl.constexpr,
):
    """See `torch_backend.track_sentences`; runs of at most `tokens` tokens that end at a delimiter or at the end.

    `hidden_stride` counts chunks of `chunk` elements.
    """
    request = tl.program_id(0)
    row = tl.load(spans + request)
    begin = tl.load(spans + requests + request)
    end = tl.load(spans + 2 * requests + request).to(tl.int32)
    position = tl.load(spans + 3 * requests + request).to(tl.int32)
    ends += row * ends_stride
    text += row * longest + position
    open_sum += row * width
    embeddings += row * (held + 1) * width
    closed = tl.load(count + row)
    after = tl.load(after_delimiter + row).to(tl.int32)
    length = tl.zeros([1], tl.float32)
    if embeds:
        length += tl.load(open_length + row)
    i = end * 0
    e = tl.arange(0, block)
    while i < end:
        token = i + tl.arange(0, tokens)
        inside = token < end
        ids = tl.load(token_ids + begin + token, mask=inside, other=0)
        if keeps_text:
            tl.store(text + token, ids.to(tl.int32), mask=inside)
        hit = tl.load(delimiters + ids, mask=inside, other=0).to(tl.int32)
        first = tl.min(tl.where(inside & (hit != 0), token, i + tokens), axis=0)
        # 1 where a delimiter right after another only moves the end of the sentence just closed.
        merged = ((first == i) & (after != 0)).to(tl.int32) * merge
        closes = (first < i + tokens).to(tl.int32)
        stop = tl.minimum(tl.minimum(first + 1, i + tokens), end)
        if embeds:  # noqa: SIM102 - a branch of the compiler; the next one is taken on the GPU
            if merged == 0:
                length += (stop - i).to(tl.float32)
                squares = tl.zeros([block], tl.float32)
                for start in range(0, width, block):
                    known = start + e < width
                    total = tl.load(open_sum + start + e, mask=known, other=0.0)
                    for t in range(i, stop):
                        vector = hidden + (begin + t) * hidden_stride * chunk + start
                        total += tl.load(vector + e, mask=known, other=0.0).to(tl.float32)
                    tl.store(open_sum + start + e, total, mask=known)
                    squares += (total / length) * (total / length)
                if closes != 0:
                    # Other threads of this program may have written the sums.
                    tl.debug_barrier()
                    norm = tl.sqrt(tl.sum(squares, axis=0)) + EPSILON
                    for start in range(0, width, block):
                        known = start + e < width
                        unit = tl.load(open_sum + start + e, mask=known, other=0.0) / length / norm
                        tl.store(embeddings + (closed % held) * width + start + e, unit, mask=known)
                    tl.debug_barrier()
                    for start in range(0, width, block):
                        tl.store(open_sum + start + e, tl.zeros([block], tl.float32), mask=start + e < width)
                    length = length * 0.0
                tl.debug_barrier()
        if closes != 0:
            number = closed - merged
            tl.store(ends + number, position + first, mask=number >= 0)
        closed += closes * (1 - merged)
        after = closes
        i = stop
    tl.debug_barrier()
    tl.store(count + row, closed)
    tl.store(after_delimiter + row, after.to(tl.int8))
    if embeds:
        tl.store(open_length + row + tl.arange(0, 1), length)


@kernel("embeddings")
def compare_sentences(
    embeddings,
    rows,
    count,
    compared,
    penalties,
    held,
    row_stride,
    sentence_stride,
    penalty_stride,
    threshold,
    hidden: tl.constexpr,
    latest: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    chunk: tl.constexpr,
):
    """Update the penalties of `block` earlier sentences of a request; `latest` is the rule "last".

    Strides of embeddings count chunks of `chunk` elements; products take `depth` elements at a time.
    """
    blocks = tl.cdiv(held, block)
    row = tl.load(rows + tl.program_id(0) // blocks)
    end = tl.load(count + row)
    oldest = tl.maximum(end - held, 0)
    number = oldest + tl.program_id(0) % blocks * block + tl.arange(0, block)
    valid = number < end
    begin = tl.maximum(tl.load(compared + row), oldest)
    base = embeddings + row * row_stride * chunk
    own = base + (number % held) * sentence_stride * chunk
    penalty = penalties + row * penalty_stride + number
    known = tl.load(penalty, mask=valid, other=0.0)
    best = tl.zeros([block], tl.float32)
    if latest:
        best = known
    e = tl.arange(0, depth)
    # In ascending order, so that the latest repeat overwrites earlier ones.
    for step in range(tl.cdiv(end - begin, columns)):
        later = begin + step * columns + tl.arange(0, columns)
        there = later < end
        others = base + (later % held) * sentence_stride * chunk
        cosine = tl.zeros([block, columns], tl.float32)
        for start in range(0, hidden, depth):
            inside = start + e < hidden
            a = tl.load(own[:, None] + start + e[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            b = tl.load(others[None, :] + start + e[:, None], mask=there[None, :] & inside[:, None], other=0.0)
            cosine += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        repeats = (cosine > threshold) & there[None, :] & (later[None, :] > number[:, None])
        if latest:
            found = tl.max(tl.where(repeats, later[None, :], -1), axis=1)
            at = tl.sum(tl.where(later[None, :] == found[:, None], cosine, 0.0), axis=1)
            best = tl.where(found >= 0, at, best)
        else:
            best = tl.maximum(best, tl.max(tl.where(repeats, cosine, 0.0), axis=1))
    if not latest:
        best = tl.maximum(best, known)
    tl.store(penalty, best, mask=valid)
