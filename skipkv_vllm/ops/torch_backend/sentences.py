"""Sentences: where they end, their embeddings, and the penalties of sentences that later ones repeat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional

RULES = ("max", "last")
"""`rule` of `sentence_similarity`: with several repeats, the highest similarity or the latest repeat's."""


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
    """Close sentences at delimiters, and embed each as its mean hidden state (SkipKV eq. 2).

    A delimiter closes the sentence that it ends. A delimiter right after another one has no text of its own: with
    `merge` it moves the end of the sentence just closed, whose embedding stays; without `merge` it is a sentence by
    itself. This runs at every step, so nothing waits for the device.

    Args:
        token_ids: integer `[T]`, all tokens of the step.
        hidden: `[T, E]` last hidden states, or None to compute no embeddings.
        spans: int64 `[4, R]`; of each tracked request its row of the state (all different), its first token in the
            step, the number of its tokens (at least 1) and the logical position of the first.
        num_tokens: sum of the numbers.
        delimiters: bool `[vocabulary]`.
        merge: see above.
        ends: int32 `[rows, most + 1]`, position of each sentence's last token, and the largest int32 for sentences
            that are not closed yet; the last column is for discarded writes and keeps that number.
        count: int64 `[rows]` sentences closed so far.
        after_delimiter: bool `[rows]`, whether the token before was a delimiter.
        open_length, open_sum: float32 `[rows]` and `[rows, E]`, of the sentence being written.
        embeddings: `[rows, S + 1, E]`; sentence n goes to entry `n % S` as a unit vector; the last entry is for
            discarded writes.
        text: int32 `[rows, longest]`, every token id by position; `[rows, 0]` to store none.
    """
    step = _step_of(spans, num_tokens)
    ids = token_ids[step.token]
    if text.shape[1]:
        text[step.row, step.position] = ids.to(torch.int32)
    ends_here = delimiters[ids.long()]
    before = ends_here.roll(1)
    before[step.first] = after_delimiter[step.rows]
    closes = ends_here & ~before if merge else ends_here
    running = closes.long().cumsum(0)
    closed = running - (running[step.first] - closes[step.first].long())[step.request]
    sentence = count[step.row] + closed - 1
    _store_ends(ends, step, sentence, closes, ends_here)
    if hidden is not None:
        # A piece is the part of a sentence that lies in this step; each request has one piece more than it closes.
        pieces = _Pieces(running - closes.long() + step.request, closes, counted=closes | ~ends_here)
        means = _add_to_open(hidden, step, pieces, open_length, open_sum)
        # Of more sentences than there are entries only the newest are stored, so that no entry is written twice.
        most = embeddings.shape[1] - 1
        stored = closes & (running[step.last][step.request] - running < most)
        embeddings[step.row, torch.where(stored, sentence % most, most)] = _unit(means).to(embeddings.dtype)
    after_delimiter[step.rows] = ends_here[step.last]
    count[step.rows] += closed[step.last]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + functional.EPSILON)


def sentence_similarity(
    embeddings: Tensor,
    rows: Tensor,
    count: Tensor,
    compared: Tensor,
    penalties: Tensor,
    threshold: float,
    rule: int,
) -> None:
    """Compare the sentences closed since the last call with all earlier ones (SkipKV eqs. 1 and 3).

    If the cosine of two sentences is strictly above the threshold, it becomes the penalty of the earlier one.

    Args:
        embeddings: unit vectors `[rows, S + 1, E]`; sentence n of a request is entry `n % S` of its row, so only
            the S newest are there.
        rows: int64 `[R]`, the requests to update, all different.
        count: int64 `[rows]` sentences closed so far.
        compared: int64 `[rows]` sentences that were compared before; afterwards `count`.
        penalties: float32 `[rows, most + 1]` by sentence number.
        threshold: cosine.
        rule: index into `RULES`.
    """
    most = embeddings.shape[1] - 1
    for row in rows.tolist():
        last, first = int(count[row]), int(compared[row])
        oldest = max(0, last - most)
        numbers = torch.arange(oldest, last, device=embeddings.device)
        unit = embeddings[row, numbers % most].float()
        cosine = unit @ unit.T
        new = (numbers[None, :] >= first) & (numbers[None, :] > numbers[:, None])
        repeats = (cosine > threshold) & new
        known = penalties[row, oldest:last]
        if RULES[rule] == "max":
            fresh = torch.where(repeats, cosine, 0.0).amax(dim=1) if last > oldest else known
            penalties[row, oldest:last] = torch.maximum(known, fresh)
        elif last > oldest:
            latest = torch.where(repeats, numbers - oldest, 0).amax(dim=1, keepdim=True)
            fresh = cosine.gather(1, latest).squeeze(1)
            penalties[row, oldest:last] = torch.where(repeats.any(dim=1), fresh, known)
        compared[row] = last


def token_penalties(ends: Tensor, penalties: Tensor, first: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Look up the penalty of each token's sentence (SkipKV eq. 3).

    Args:
        ends: int32 `[rows, most + 1]`, see `track_sentences`; past the closed sentences the largest int32.
        penalties: float32 `[rows, most + 1]` by sentence number.
        first: int64 `[rows]`; tokens at lower positions belong to no sentence.
        rows: int64 `[R]`.
        positions: int32 `[R, L, H, N]`; the penalty of a negative position, or of one past the longest sequence, is
            undefined.

    Returns:
        float32, of the shape of `positions`; 0 for tokens of no sentence.
    """
    flat = positions.flatten(1)
    number = torch.searchsorted(ends[rows], flat)
    found = torch.where(flat >= first[rows, None], penalties[rows].gather(1, number), 0.0)
    return found.view(positions.shape)


class _Step(NamedTuple):
    """The tracked tokens of a step, request by request.

    Attributes:
        rows, first, last: int64 `[R]`; of each request its row of the state, and the places of its first and last
            token.
        request, row, token, position: int64 `[tokens]`; of each token its request and that one's row, its index in
            `token_ids` and its logical position.
    """

    rows: Tensor
    first: Tensor
    last: Tensor
    request: Tensor
    row: Tensor
    token: Tensor
    position: Tensor


def _step_of(spans: Tensor, num_tokens: int) -> _Step:
    rows, begins, numbers, positions = spans
    request = torch.repeat_interleave(torch.arange(rows.shape[0], device=rows.device), numbers, output_size=num_tokens)
    last = numbers.cumsum(0) - 1
    first = last + 1 - numbers
    offset = torch.arange(num_tokens, device=rows.device) - first[request]
    return _Step(rows, first, last, request, rows[request], begins[request] + offset, positions[request] + offset)


def _store_ends(ends: Tensor, step: _Step, sentence: Tensor, closes: Tensor, ends_here: Tensor) -> None:
    """Store the ends of closed sentences, and move those that merged delimiters extend.

    A closing token ends a sentence that was open, whose end was the largest number. A merged delimiter then moves that
    end, and the larger of the two positions stays. Discarded writes have a column of their own: a boolean index would
    wait for the device.
    """
    discard = ends.shape[1] - 1
    position = step.position.to(torch.int32)
    most = torch.iinfo(torch.int32).max
    ends[step.row, torch.where(closes, sentence, discard)] = torch.where(closes, position, most)
    column = torch.where(ends_here, sentence, discard)
    ends.view(-1).scatter_reduce_(0, step.row * ends.shape[1] + column, position, reduce="amax")


class _Pieces(NamedTuple):
    """The parts of sentences that lie in a step.

    Attributes:
        number: int64 `[tokens]`, piece of each token.
        closes: bool `[tokens]`, whether a token closes its piece's sentence.
        counted: bool `[tokens]`, whether a token is part of the mean.
    """

    number: Tensor
    closes: Tensor
    counted: Tensor


def _add_to_open(hidden: Tensor, step: _Step, pieces: _Pieces, open_length: Tensor, open_sum: Tensor) -> Tensor:
    """Add the pieces to the open sentences; return the mean of each token's sentence so far, float32 `[tokens, E]`."""
    number, closes, counted = pieces
    most = number.shape[0] + step.rows.shape[0]
    sums = torch.zeros(most, hidden.shape[1], dtype=torch.float32, device=number.device)
    lengths = torch.zeros(most, dtype=torch.float32, device=number.device)
    sums.index_add_(0, number, hidden[step.token].float() * counted[:, None])
    lengths.index_add_(0, number, counted.float())
    sums.index_add_(0, number[step.first], open_sum[step.rows])
    lengths.index_add_(0, number[step.first], open_length[step.rows])
    still_open = number[step.last] + closes[step.last].long()
    open_sum[step.rows] = sums[still_open]
    open_length[step.rows] = lengths[still_open]
    return sums[number] / lengths[number].clamp(min=1)[:, None]
