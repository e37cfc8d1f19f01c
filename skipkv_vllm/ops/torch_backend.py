"""The operators in PyTorch: what every other backend must compute, and what runs where none is to be had.

Loops over requests and layers and reads lengths on the host; the schemas and sizes stand in `schema.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as reference
from .paging import LayerPages, Layout, layer_pages

RULES = ("max", "last")
"""`rule` of `sentence_similarity`: with several repeats, the highest similarity or the latest repeat's."""


class THOUGHT:
    """Flags of a token in the `vocabulary` of `track_thoughts`."""

    SPLIT = 1
    """between two thoughts: steered"""
    DELIMITER = 2
    """ends a sentence"""
    BEGIN = 4
    END = 8
    """markers of thinking"""


KEYWORD_SHIFT = 4

STATE = (
    "vector",
    "thinking",
    "kinds",
    "machine",
    "after_delimiter",
    "latched",
    "execution",
    "reflection",
    "transition",
    "steered",
)
"""Columns of the `state` of `track_thoughts`: row of the request's vector; whether it is thinking; kinds of the
keywords in the open sentence and state of the machine that finds them; whether the last token was a delimiter; the N
that counts now; closed sentences by kind; tokens steered."""


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
    """`mix * importance - (1 - mix) * redundancy - penalty` of every held token, R-KV and SkipKV eq. 6.

    Tokens count in ascending position, whatever their slots. The W newest score `-penalty`: they are pinned.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, different within a row.
        num_resident: int32 `[R]`, each above W and at most N.
        queries: `[R, L, W, Hq, D]`, post-RoPE, in the dtype of the cache; float32 where that has 8 bits. Keys are
            taken as they are stored, so the scale of a quantised cache must have been multiplied into them.
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
            held = pages.keys.read_pages(_pages(table[r], length, pages), length)
            order = positions[r, i, :, :length].argsort(dim=-1)
            keys = held.gather(1, order[..., None].expand(held.shape)).transpose(0, 1)
            score = -(1 - mix) * reference.redundancy(keys, threshold=threshold)
            score[:, length - window :] = 0
            score[:, : length - window] += mix * reference.importance(queries[r, i], keys, window=window, pool=pool)
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
    """Sum over the newest queries of what every held token means to their attention.

    With attention A, value v and output o of a query: A, or with `output_error` `A^2 |v - o|^2`, which is what leaving
    the token out changes in the output, squared and to first order. Both are averaged over the query heads of a kv
    head. A query attends to the held tokens that are not in its future.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        positions: int32 `[R, L, H, N]`, different within a row.
        num_resident: int32 `[R]`, at least 1 and at most N.
        queries: `[R, L, n, Hq, D]`, post-RoPE, oldest first; of dtype and scale as in `score_tokens`.
        num_queries: int32 `[R]`, how many of the n count, the last ones; 0 to n.
        newest: int32 `[R]`, position of the last query; the others precede it one by one. Every query that counts
            sees at least one held token.
        output_error: which of the two.

    Returns:
        float32 `[R, L, H, N]`, not negative; 0 past a request's length.
    """
    found = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
    lengths = zip(num_resident.tolist(), num_queries.tolist(), newest.tolist(), strict=True)
    for r, (length, number, last) in enumerate(lengths):
        if number == 0:
            continue
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            held = _pages(table[r], length, pages)
            counted, where = queries[r, i, -number:], positions[r, i, :, :length]
            logits = reference.logits_until(counted, pages.keys.read_pages(held, length), where, last)
            attention = logits.softmax(dim=-1)
            if output_error:
                found[r, i, :, :length] = reference.output_error(attention, pages.values.read_pages(held, length))
            else:
                found[r, i, :, :length] = attention.sum(dim=2).mean(dim=1)
    return found


def key_similarity(
    caches: list[Tensor], pointers: Tensor, layout: int, table: Tensor, num_resident: Tensor, length: int
) -> Tensor:
    """Cosine of every held key with the mean of the held keys' unit vectors: how much a key is like the others.

    Args:
        caches, pointers, layout: the pages.
        table: int32 `[R, pages]`.
        num_resident: int32 `[R]`, at least 1 and at most `length`.
        length: N.

    Returns:
        float32 `[R, L, H, N]`; 0 past a request's length.
    """
    shape = (table.shape[0], len(caches), caches[0].shape[1], length)
    found = torch.zeros(shape, dtype=torch.float32, device=table.device)
    for r, number in enumerate(num_resident.tolist()):
        for i, cache in enumerate(caches):
            pages = layer_pages(cache, Layout(layout))
            keys = pages.keys.read_pages(_pages(table[r], number, pages), number)
            found[r, i, :, :number] = reference.key_similarity(keys)
    return found


def select_keep(
    scores: Tensor,
    positions: Tensor,
    num_resident: Tensor,
    num_keep: Tensor,
    pin_below: Tensor,
    pin_from: Tensor,
    max_moves: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the pinned and the best tokens of every row, exactly `num_keep`, and say which cells must move.

    Of equal scores the lower position stays. Kept tokens in one of the first `num_keep` slots stay in place; the
    others move into the slots of evicted ones, first to first, both in ascending order.

    Args:
        scores: float32 `[R, L, H, N]`, no NaN.
        positions: int32 `[R, L, H, N]`.
        num_resident, num_keep: int32 `[R]`; num_keep <= num_resident.
        pin_below, pin_from: int32 `[R]`; positions below the first or not below the second always stay; they are
            at most `num_keep` in every row.
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
        kept = torch.zeros_like(pinned).scatter(-1, order, reference.select_per_head(*by_position, keep))
        moved_from, moved_to, valid = reference.move_list(kept, keep)
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
    """Carry out move lists: K and V of all layers and requests, in place, and note the positions.

    First, pages of the target table that differ from those of the source table are copied whole, content unseen;
    then cells move, read through the source table and written through the target table. No page that one request
    writes may be read or written by another, except that requests may write equal positions to a page that they share;
    a page that replaces another is not among its request's source pages. Cells are copied bit by bit, whatever their
    dtype.

    Args:
        caches, pointers, layout: the pages.
        sidecar: int32 `[L, pages, H, P]`; afterwards the first `num_keep` slots hold the positions of their tokens.
        positions: int32 `[R, L, H, N]` by slot, before.
        source_table, target_table: int32 `[R, pages]`, before and after; the latter covers `num_keep` tokens.
        num_keep: int32 `[R]`.
        source, hole, count: the moves, as `select_keep` gives them.
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


def track_sentences(
    token_ids: Tensor,
    hidden: Tensor | None,
    spans: Tensor,
    num_tokens: int,
    delimiters: Tensor,
    merge: bool,
    ends: Tensor,
    count: Tensor,
    after_delimiter: Tensor,
    open_length: Tensor,
    open_sum: Tensor,
    embeddings: Tensor,
    text: Tensor,
) -> None:
    """Close sentences at delimiters, and embed each as its mean hidden state, SkipKV eq. 2.

    A delimiter closes the sentence that it ends. Right after another delimiter it opens none: with `merge` it moves
    the end of the sentence just closed, whose embedding stays; without, it is a sentence of its own. Nothing waits
    for the device here, because this runs at every step.

    Args:
        token_ids: integer `[T]`, all tokens of the step.
        hidden: `[T, E]` last hidden states, or None where no embeddings are kept.
        spans: int64 `[4, R]`, of each tracked request its state slot (all different), its first token in the step, the
            number of its tokens (at least 1) and the logical position of the first.
        num_tokens: sum of the numbers.
        delimiters: bool `[vocabulary]`.
        merge: see above.
        ends: int32 `[slots, most + 1]`, position of each sentence's last token, and the largest int32 for those that
            are not closed yet; the last column is for nobody and keeps that number.
        count: int64 `[slots]` sentences closed so far.
        after_delimiter: bool `[slots]`, whether the token before was a delimiter.
        open_length, open_sum: float32 `[slots]` and `[slots, E]`, of the sentence being written.
        embeddings: `[slots, S + 1, E]`; sentence n goes to row `n % S` as a unit vector, the last row is for nobody.
        text: int32 `[slots, longest]`, every token id by position; `[slots, 0]` where nobody reads it.
    """
    slots, begins, numbers, positions = spans
    request = torch.repeat_interleave(
        torch.arange(slots.shape[0], device=slots.device), numbers, output_size=num_tokens
    )
    last = numbers.cumsum(0) - 1
    first = last + 1 - numbers
    offset = torch.arange(num_tokens, device=slots.device) - first[request]
    token, slot = begins[request] + offset, slots[request]
    ids = token_ids[token]
    if text.shape[1]:
        text[slot, positions[request] + offset] = ids.to(torch.int32)
    ends_here = delimiters[ids.long()]
    closes = ends_here
    if merge:
        before = ends_here.roll(1)
        before[first] = after_delimiter[slots]
        closes = ends_here & ~before
    running = closes.long().cumsum(0)
    closed = running - (running[first] - closes[first].long())[request]

    # A closing token ends sentence number `count + closed - 1`, which was open: its end was the largest number. A
    # merged delimiter then moves that end, and the larger of the two positions stays. Writes that must go nowhere have
    # a column of their own: a boolean index would wait.
    sentence = count[slot] + closed - 1
    position = (positions[request] + offset).to(torch.int32)
    most = torch.iinfo(torch.int32).max
    ends[slot, torch.where(closes, sentence, ends.shape[1] - 1)] = torch.where(closes, position, most)
    column = torch.where(ends_here, sentence, ends.shape[1] - 1)
    ends.view(-1).scatter_reduce_(0, slot * ends.shape[1] + column, position, reduce="amax")
    if hidden is not None:
        # A piece is the part of a sentence that lies in this step; each request has one more of them than it closes.
        piece = running - closes.long() + request
        sums = torch.zeros(num_tokens + slots.shape[0], hidden.shape[1], dtype=torch.float32, device=slots.device)
        lengths = torch.zeros(sums.shape[0], dtype=torch.float32, device=slots.device)
        counted = closes | ~ends_here
        sums.index_add_(0, piece, hidden[token].float() * counted[:, None])
        lengths.index_add_(0, piece, counted.float())
        sums.index_add_(0, piece[first], open_sum[slots])
        lengths.index_add_(0, piece[first], open_length[slots])
        mean = sums[piece] / lengths[piece].clamp(min=1)[:, None]
        unit = mean / (mean.norm(dim=-1, keepdim=True) + reference.EPSILON)
        held = embeddings.shape[1] - 1
        # Of more sentences than are held only the newest are stored, so that no row is written twice.
        stored = closes & (running[last][request] - running < held)
        embeddings[slot, torch.where(stored, sentence % held, held)] = unit.to(embeddings.dtype)
        still_open = piece[last] + closes[last].long()
        open_sum[slots] = sums[still_open]
        open_length[slots] = lengths[still_open]
    after_delimiter[slots] = ends_here[last]
    count[slots] += closed[last]


def sentence_similarity(
    embeddings: Tensor,
    slots: Tensor,
    count: Tensor,
    compared: Tensor,
    penalties: Tensor,
    threshold: float,
    rule: int,
) -> None:
    """Compare the sentences closed since the last call with all earlier ones, SkipKV eqs. 1 and 3.

    The earlier of two sentences whose cosine is strictly above the threshold gets it as its penalty.

    Args:
        embeddings: unit vectors `[slots, S + 1, E]`; sentence n of a request is row `n % S` of its slot, and only the
            S newest are held.
        slots: int64 `[R]`, the requests to update, all different.
        count: int64 `[slots]` sentences closed so far.
        compared: int64 `[slots]` sentences that were compared before; afterwards `count`.
        penalties: float32 `[slots, most + 1]` by sentence number.
        threshold: cosine.
        rule: index into `RULES`.
    """
    held = embeddings.shape[1] - 1
    for slot in slots.tolist():
        last, first = int(count[slot]), int(compared[slot])
        oldest = max(0, last - held)
        numbers = torch.arange(oldest, last, device=embeddings.device)
        unit = embeddings[slot, numbers % held].float()
        cosine = unit @ unit.T
        new = (numbers[None, :] >= first) & (numbers[None, :] > numbers[:, None])
        repeats = (cosine > threshold) & new
        known = penalties[slot, oldest:last]
        if RULES[rule] == "max":
            fresh = torch.where(repeats, cosine, 0.0).amax(dim=1) if last > oldest else known
            penalties[slot, oldest:last] = torch.maximum(known, fresh)
        elif last > oldest:
            latest = torch.where(repeats, numbers - oldest, 0).amax(dim=1, keepdim=True)
            fresh = cosine.gather(1, latest).squeeze(1)
            penalties[slot, oldest:last] = torch.where(repeats.any(dim=1), fresh, known)
        compared[slot] = last


def track_thoughts(
    token_ids: Tensor,
    spans: Tensor,
    vocabulary: Tensor,
    keywords: Tensor,
    merge: bool,
    interval: int,
    strengths: Tensor,
    state: Tensor,
    written: int,
    row: Tensor,
    coefficient: Tensor,
) -> None:
    """Say how strongly each token of a step is steered, and count thoughts: SkipKV's `alpha = alpha0 + gamma * N`.

    N is the number of closed sentences that are no execution, as it was after the last position whose successor is a
    multiple of `interval`. A token is steered if it ends a thought within <think> and </think>. Only committed tokens
    count, so whoever reads the same tokens finds the same coefficients.

    Args:
        token_ids: integer `[T]`, all tokens of the step.
        spans: int64 `[4, R]`, of each request its state slot (all different), its first token in the step, the number
            of its tokens and the logical position of the first.
        vocabulary: int32 `[vocabulary]`: flags of `THOUGHT` and, from bit `KEYWORD_SHIFT` on, the token's keyword
            class, 0 for tokens of no keyword.
        keywords: int32 `[states, classes]`, a machine that finds keywords: what it becomes by a token, times 4, plus
            the kinds (1 reflection, 2 transition) of the keywords that the token completes.
        merge: whether a delimiter right after another one closes nothing.
        interval: positions after which N is taken over.
        strengths: float32 `[slots, 3]`: alpha0, gamma and the largest alpha.
        state: int32 `[slots, len(STATE)]`, see `STATE`.
        written: leading entries of `row` that earlier steps may have set; they are cleared first.
        row: int32 `[>= T]`, afterwards the vector of each steered token and 0 for the others.
        coefficient: float32 `[>= T]`, of steered tokens.
    """
    row[:written] = 0
    ids, bits, machine = token_ids.tolist(), vocabulary.tolist(), keywords.tolist()
    for slot, begin, number, position in spans.T.tolist():
        now = dict(zip(STATE, state[slot].tolist(), strict=True))
        alpha0, gamma, most = strengths[slot].double().tolist()
        for t in range(begin, begin + number):
            flags = bits[ids[t]]
            step = machine[now["machine"]][flags >> KEYWORD_SHIFT]
            now["machine"], now["kinds"] = step >> 2, now["kinds"] | step & 3
            if flags & (THOUGHT.BEGIN | THOUGHT.END):
                now["thinking"] = int(not flags & THOUGHT.END)
            if now["thinking"] and flags & THOUGHT.SPLIT and (alpha := min(alpha0 + gamma * now["latched"], most)):
                row[t], coefficient[t] = now["vector"], alpha
                now["steered"] += 1
            if flags & THOUGHT.DELIMITER:
                if not (merge and now["after_delimiter"]):
                    now[("execution", "reflection", "transition", "reflection")[now["kinds"]]] += 1
                now["machine"] = now["kinds"] = 0
            now["after_delimiter"] = int(bool(flags & THOUGHT.DELIMITER))
            if (position + t - begin + 1) % interval == 0:
                now["latched"] = now["reflection"] + now["transition"]
        state[slot] = torch.tensor(list(now.values()), dtype=torch.int32)


def held_positions(sidecar: Tensor, table: Tensor, num_placed: Tensor, num_evicted: Tensor, length: int) -> Tensor:
    """Logical positions of the tokens that R requests hold, by slot.

    Args:
        sidecar: int32 `[L, pages, H, P]`, as `compact_pages` leaves it.
        table: int32 `[R, pages]`, padded with any page.
        num_placed: int32 `[R]` leading slots that the last compaction filled.
        num_evicted: int32 `[R]` tokens evicted so far; later slots hold position slot + num_evicted.
        length: resident length of the longest request; what lies past a shorter one's means nothing.

    Returns:
        int32 `[R, L, H, length]`.
    """
    slot = torch.arange(length, dtype=torch.int32, device=sidecar.device)
    by_request = sidecar[:, table.long()].permute(1, 0, 3, 2, 4)  # [R, L, H, pages, P]
    stored = by_request.flatten(3)[..., :length]
    placed, evicted = (x.view(-1, 1, 1, 1) for x in (num_placed, num_evicted))
    return torch.where(slot < placed, stored, slot + evicted)


def token_penalties(ends: Tensor, penalties: Tensor, first: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """The penalty of the sentence that holds each token, SkipKV eq. 3.

    Args:
        ends: int32 `[slots, most + 1]`, see `track_sentences`; past the closed sentences the largest int32.
        penalties: float32 `[slots, most + 1]` by sentence number.
        first: int64 `[slots]`; tokens at lower positions belong to no sentence.
        slots: int64 `[R]`.
        positions: int32 `[R, L, H, N]`; what a negative one or one past the longest sequence gets means nothing.

    Returns:
        float32, of the shape of `positions`; 0 for tokens of no sentence.
    """
    flat = positions.flatten(1)
    number = torch.searchsorted(ends[slots], flat)
    found = torch.where(flat >= first[slots, None], penalties[slots].gather(1, number), 0.0)
    return found.view(positions.shape)


def record_queries(query: Tensor, index: Tensor, rows: Tensor) -> None:
    """Copy each token's query to its place in the ring.

    Args:
        query: `[T, Hq, D]`.
        index: int64 `[>= T]`, row of each token; several tokens may only share a row that nobody reads.
        rows: `[rows, Hq, D]` in the dtype of the query.
    """
    rows.index_copy_(0, index[: query.shape[0]], query)


def steer_add(hidden: Tensor, coefficient: Tensor, row: Tensor, vectors: Tensor) -> Tensor:
    """Add `coefficient * vectors[row]` to each token's hidden state; tokens of row 0 stay as they are, bit by bit.

    Args:
        hidden: `[T, E]`.
        coefficient: float32 `[>= T]`.
        row: int32 `[>= T]`.
        vectors: float32 `[rows, E]`; row 0 is nobody's.

    Returns:
        `[T, E]` in the dtype of `hidden`; computed in float32.
    """
    tokens = hidden.shape[0]
    row, coefficient = row[:tokens], coefficient[:tokens]
    steered = (hidden.float() + coefficient[:, None] * vectors[row.long()]).to(hidden.dtype)
    return torch.where((row == 0)[:, None], hidden, steered)


def _pages(table: Tensor, length: int, pages: LayerPages) -> Tensor:
    return table[: -(-length // pages.page_size)].long()


def _by_page(values: Tensor, length: int, old: Tensor, size: int) -> Tensor:
    """The first `length` of `values` `[H, N]` in the shape of `old` `[pages, H, P]`, which keeps the rest."""
    flat = old.transpose(0, 1).reshape(values.shape[0], -1).clone()
    flat[:, :length] = values[:, :length]
    return flat.view(values.shape[0], -1, size).transpose(0, 1)
