"""The sentence tracker: finds sentences and their embeddings while they are written, on the device.

After each forward pass it reads the step's token ids and last hidden states. It never tells the host how
many sentences there are, so nothing waits for it; all shapes follow from token counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..policies.base import SentenceOptions
from .tables import SentenceTables


class SentenceState(NamedTuple):
    """What the tracker knows of one request. S is the longest possible sequence.

    Attributes:
        first: logical position at which tracking began; earlier tokens belong to no sentence.
        ends: int32 `[S]`, logical position of the last token of each sentence, ascending; beyond the
            closed sentences the largest int32.
        penalties: float32 `[S]`, see `ops.sentence_penalties`; 0 for sentences that nothing repeats.
    """

    first: int
    ends: Tensor
    penalties: Tensor

    def sentence_of(self, positions: Tensor) -> Tensor:
        """Number of the sentence that holds each position, from 1; 0 for tokens before `first`.

        The open sentence has the next free number.
        """
        number = torch.searchsorted(self.ends, positions.contiguous()) + 1
        return torch.where(positions >= self.first, number, 0)

    def penalty_of(self, positions: Tensor) -> Tensor:
        """Penalty of each position's sentence, float32, of the positions' shape."""
        number = self.sentence_of(positions)
        return torch.where(number > 0, self.penalties[(number - 1).clamp(min=0)], 0.0)


class TrackedTokens(NamedTuple):
    """The tokens of one step that belong to sentences: T tokens of R requests, requests contiguous.

    Attributes:
        token_ids: `[T]` ids of the tokens just computed.
        positions: `[T]` their logical positions.
        request: int64 `[T]` row in `slots` of each token, ascending; every row has a token.
        starts: int64 `[R + 1]` first token of each row.
        slots: int64 `[R]` state slot of each row.
        hidden: last hidden states `[T, E]` (after the final norm), or None without embeddings.
    """

    token_ids: Tensor
    positions: Tensor
    request: Tensor
    starts: Tensor
    slots: Tensor
    hidden: Tensor | None


class SentenceTracker:
    """Per-slot sentence state of all running requests, in persistent buffers.

    Args:
        tables: the tokenizer's delimiters.
        options: similarity threshold and number of embeddings kept per request.
        num_slots: requests that can run at once.
        max_length: longest sequence, in tokens.
        hidden_size: E; 0 where no policy needs embeddings.
        vocab_size: number of token ids.
        dtype: of the stored embeddings.
        device: where the model runs.
    """

    def __init__(
        self,
        tables: SentenceTables,
        options: SentenceOptions,
        *,
        num_slots: int,
        max_length: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tables = tables
        self.options = options
        self.has_embeddings = hidden_size > 0
        self._first = [0] * num_slots
        size = max(vocab_size, max(tables.delimiters) + 1)
        self._is_delimiter = torch.zeros(size, dtype=torch.bool, device=device)
        self._is_delimiter[torch.tensor(sorted(tables.delimiters), device=device)] = True
        # The last column of `_ends` and `_penalties` and the last row of `_embeddings` take the writes
        # that must go nowhere: masking by boolean index would make the host wait for the device.
        self._ends = torch.full((num_slots, max_length + 1), -1, dtype=torch.int32, device=device)
        self._penalties = torch.zeros(num_slots, max_length + 1, dtype=torch.float32, device=device)
        self._count = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._after_delimiter = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._open_length = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self._open_sum = torch.zeros(num_slots, hidden_size, dtype=torch.float32, device=device)
        kept = options.max_sentences if self.has_embeddings else 0
        self._embeddings = torch.zeros(num_slots, kept + 1, hidden_size, dtype=dtype, device=device)
        self._order = torch.arange(max_length + 1, dtype=torch.int64, device=device)
        self._kept_order = torch.arange(kept, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def reset(self, slot: int, first: int) -> None:
        """Forget the request in `slot`: a new or resumed one takes it, tracked from position `first`."""
        self._first[slot] = first
        self._ends[slot].fill_(-1)
        self._penalties[slot].zero_()
        self._count[slot] = 0
        self._after_delimiter[slot] = False
        self._open_length[slot] = 0
        self._open_sum[slot].zero_()

    def update(self, tokens: TrackedTokens) -> None:
        """Take in the tokens of one step."""
        slot = tokens.slots[tokens.request]
        first, last = tokens.starts[:-1], tokens.starts[1:] - 1
        ends_here = self._is_delimiter[tokens.token_ids.long()]
        if self.tables.merges_delimiters:
            after_delimiter = ends_here.roll(1)
            after_delimiter[first] = self._after_delimiter[tokens.slots]
            closes = ends_here & ~after_delimiter
        else:
            closes = ends_here
        running = closes.long().cumsum(0)
        closed = running - (running[first] - closes[first].long())[tokens.request]

        # A closing token ends sentence number `count + closed - 1`; a delimiter right after it moves that
        # end, and the larger of the two positions stays.
        sentence = self._count[slot] + closed - 1
        nowhere = self._ends.shape[1] - 1
        column = torch.where(ends_here, sentence, nowhere)
        self._ends.view(-1).scatter_reduce_(
            0, slot * self._ends.shape[1] + column, tokens.positions.to(torch.int32), reduce="amax"
        )
        if self.has_embeddings:
            self._store_embeddings(tokens, slot, sentence, running, closes, counted=closes | ~ends_here)
        self._after_delimiter[tokens.slots] = ends_here[last]
        self._count[tokens.slots] += closed[last]

    def _store_embeddings(
        self,
        tokens: TrackedTokens,
        slot: Tensor,
        sentence: Tensor,
        running: Tensor,
        closes: Tensor,
        counted: Tensor,
    ) -> None:
        """Store the mean hidden state of each sentence closed in this step and carry the open rest on.

        A piece is the part of a sentence that lies in this step; pieces are numbered through all requests,
        and each request has one more of them than it closes sentences.
        """
        assert tokens.hidden is not None
        first, last = tokens.starts[:-1], tokens.starts[1:] - 1
        piece = running - closes.long() + tokens.request
        n_pieces = piece.shape[0] + first.shape[0]
        sums = torch.zeros(n_pieces, tokens.hidden.shape[1], dtype=torch.float32, device=piece.device)
        lengths = torch.zeros(n_pieces, dtype=torch.float32, device=piece.device)
        sums.index_add_(0, piece, tokens.hidden.float() * counted[:, None])
        lengths.index_add_(0, piece, counted.float())
        sums.index_add_(0, piece[first], self._open_sum[tokens.slots])
        lengths.index_add_(0, piece[first], self._open_length[tokens.slots])

        mean = sums[piece] / lengths[piece].clamp(min=1)[:, None]
        unit = mean / (mean.norm(dim=-1, keepdim=True) + ops.EPSILON)
        kept = self.options.max_sentences
        # Of more sentences than are kept only the newest are stored, so that no row is written twice.
        stored = closes & (running[last][tokens.request] - running < kept)
        self._embeddings[slot, torch.where(stored, sentence % kept, kept)] = unit.to(self._embeddings.dtype)
        open_piece = piece[last] + closes[last].long()
        self._open_sum[tokens.slots] = sums[open_piece]
        self._open_length[tokens.slots] = lengths[open_piece]

    def state(self, slot: int) -> SentenceState:
        """The request's sentences, with the penalties brought up to date."""
        if self.has_embeddings:
            self._update_penalties(slot)
        ends = torch.where(self._order < self._count[slot], self._ends[slot], torch.iinfo(torch.int32).max)
        return SentenceState(self._first[slot], ends, self._penalties[slot])

    def _update_penalties(self, slot: int) -> None:
        number, exists = self._held(slot)
        fresh = ops.sentence_penalties(
            self._embeddings[slot, number % self.options.max_sentences],
            exists,
            threshold=self.options.similarity_threshold,
            rule=self.tables.penalty_rule,
        )
        # A sentence found repeated stays so, even when the embedding of its repeat is no longer held.
        number = number.clamp(max=self._penalties.shape[1] - 1)
        known = self._penalties[slot, number]
        keep_known = known >= fresh if self.tables.penalty_rule == "max" else fresh == 0
        self._penalties[slot, number] = torch.where(keep_known, known, fresh)

    def _held(self, slot: int) -> tuple[Tensor, Tensor]:
        """Numbers of the sentences whose embeddings are held, oldest first, and which of them exist."""
        number = (self._count[slot] - self.options.max_sentences).clamp(min=0) + self._kept_order
        return number, number < self._count[slot]

    def similar_pairs(self, slot: int) -> tuple[Tensor, Tensor]:
        """Sentences above the threshold: int64 `[P, 2]` (earlier, later) and their cosines float32 `[P]`.

        For traces; covers the sentences whose embeddings are held, and makes the host wait.
        """
        number, exists = self._held(slot)
        unit = self._embeddings[slot, number % self.options.max_sentences].float()
        cosine = unit @ unit.T
        found = ((cosine > self.options.similarity_threshold) & exists & exists[:, None]).triu(1)
        return number[found.nonzero()], cosine[found]
