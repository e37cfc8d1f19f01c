"""The sentence tracker: finds sentences and their embeddings while they are written, on the device.

After each forward pass it reads the step's token ids and last hidden states. It never tells the host how
many sentences there are, so nothing waits for it; all shapes follow from token counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...policies.base import SentenceOptions
from ...sentences.recurrence import GRAM, next_occurrence, repeated_shares
from ...sentences.tables import SentenceTables

OPEN = torch.iinfo(torch.int32).max
"""End of a sentence that is not closed yet."""

MOSTLY = 0.5
"""Share of a sentence's phrases that recur in one later sentence, above which a trace calls it repeated."""


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Entries of a table `[R, longest]` by logical position, for positions `[R, L, H, N]` of its requests."""
    # What lies past a shorter request's tokens means nothing, but must lie within the table.
    flat = positions.flatten(1).clamp(0, table.shape[1] - 1).long()
    return table.gather(1, flat).view(positions.shape)


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


class TrackedTokens(NamedTuple):
    """The tokens of one step that belong to sentences, of R requests.

    Attributes:
        token_ids: integer `[T]`, all tokens of the step.
        spans: int64 `[4, R]`: state slot, first token in the step, number of tokens, position of the first token.
        num_tokens: sum of the numbers.
        hidden: last hidden states `[T, E]` (after the final norm), or None without embeddings.
    """

    token_ids: Tensor
    spans: Tensor
    num_tokens: int
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
        keeps_text: whether sentences are compared by their words; not together with embeddings.
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
        keeps_text: bool = False,
    ) -> None:
        self.tables = tables
        self.options = options
        self.has_embeddings, self.keeps_text = hidden_size > 0, keeps_text
        self._first = [0] * num_slots
        size = max(vocab_size, max(tables.delimiters) + 1)
        self._is_delimiter = torch.zeros(size, dtype=torch.bool, device=device)
        self._is_delimiter[torch.tensor(sorted(tables.delimiters), device=device)] = True
        # The last column of `_ends` and `_penalties` and the last row of `_embeddings` take the writes
        # that must go nowhere: masking by boolean index would make the host wait for the device.
        self._ends = torch.full((num_slots, max_length + 1), OPEN, dtype=torch.int32, device=device)
        self._penalties = torch.zeros(num_slots, max_length + 1, dtype=torch.float32, device=device)
        self._text = torch.zeros(num_slots, max_length + 1 if keeps_text else 0, dtype=torch.int32, device=device)
        self._count = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._compared = torch.zeros_like(self._count)
        self._first_of = torch.zeros_like(self._count)
        self._after_delimiter = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._open_length = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self._open_sum = torch.zeros(num_slots, hidden_size, dtype=torch.float32, device=device)
        kept = options.max_sentences if self.has_embeddings else 0
        self._embeddings = torch.zeros(num_slots, kept + 1, hidden_size, dtype=dtype, device=device)
        self._kept_order = torch.arange(kept, dtype=torch.int64, device=device)
        self._track = ops.function("track_sentences", device)
        self._similarity = ops.function("sentence_similarity", device)
        self._look_up = ops.function("token_penalties", device)

    @property
    def compares(self) -> bool:
        """Whether it knows which sentences are repeated."""
        return self.has_embeddings or self.keeps_text

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def reset(self, slot: int, first: int) -> None:
        """Forget the request in `slot`: a new or resumed one takes it, tracked from position `first`."""
        self._first[slot] = first
        self._first_of[slot] = first
        self._ends[slot].fill_(OPEN)
        self._penalties[slot].zero_()
        self._count[slot] = 0
        self._compared[slot] = 0
        self._after_delimiter[slot] = False
        self._open_length[slot] = 0
        self._open_sum[slot].zero_()

    def update(self, tokens: TrackedTokens) -> None:
        """Take in the tokens of one step."""
        self._track(
            tokens.token_ids,
            tokens.hidden if self.has_embeddings else None,
            tokens.spans,
            tokens.num_tokens,
            self._is_delimiter,
            self.tables.merges_delimiters,
            self._ends,
            self._count,
            self._after_delimiter,
            self._open_length,
            self._open_sum,
            self._embeddings,
            self._text,
        )

    def state(self, slot: int) -> SentenceState:
        """The request's sentences, with the penalties brought up to date."""
        self._compare(torch.tensor([slot], device=self._count.device))
        return SentenceState(self._first[slot], self._ends[slot], self._penalties[slot])

    def penalties(self, slots: Tensor, positions: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """By how much later text repeats the sentence of each token: float32, of the shape of the positions.

        Args:
            slots: integer `[R]`.
            positions: int32 `[R, L, H, N]`; see `ops.batched.token_penalties`.
            lengths: integer `[R]`, logical lengths.
            longest: the longest of them.
        """
        rows = slots.long()
        if self.keeps_text:
            return look_up(self._shares(rows, lengths, longest), positions)
        self._compare(rows)
        found: Tensor = self._look_up(self._ends, self._penalties, self._first_of, rows, positions)
        return found

    def _shares(self, rows: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """See `repeated_shares`; float32 `[R, longest]` by logical position."""
        order = torch.arange(longest, device=rows.device)
        is_text = (order >= self._first_of[rows, None]) & (order < lengths[:, None])
        return repeated_shares(self._text[rows, :longest], is_text, self._ends[rows])

    def _compare(self, slots: Tensor) -> None:
        """Compare the sentences that were closed since the last time with the earlier ones."""
        if self.has_embeddings:
            rule = ops.RULES.index(self.tables.penalty_rule)
            self._similarity(
                self._embeddings,
                slots,
                self._count,
                self._compared,
                self._penalties,
                self.options.similarity_threshold,
                rule,
            )

    def _held(self, slot: int) -> tuple[Tensor, Tensor]:
        """Numbers of the sentences whose embeddings are held, oldest first, and which of them exist."""
        number = (self._count[slot] - self.options.max_sentences).clamp(min=0) + self._kept_order
        return number, number < self._count[slot]

    def similar_pairs(self, slot: int) -> tuple[Tensor, Tensor]:
        """Repeated sentences: int64 `[P, 2]` (earlier, later) and by how much, float32 `[P]`.

        Those whose cosine is above the threshold; or, compared by their words, those of which one later sentence says
        more than `MOSTLY` again, and that share. For traces; covers the sentences whose embeddings are held, and makes
        the host wait.
        """
        if self.keeps_text:
            return self._repeated_pairs(slot)
        number, exists = self._held(slot)
        unit = self._embeddings[slot, number % self.options.max_sentences].float()
        cosine = unit @ unit.T
        found = ((cosine > self.options.similarity_threshold) & exists & exists[:, None]).triu(1)
        return number[found.nonzero()], cosine[found]

    def _repeated_pairs(self, slot: int) -> tuple[Tensor, Tensor]:
        """See `similar_pairs`: shares of phrases that begin in the earlier sentence and occur next in the later one."""
        first, count = self._first[slot], int(self._count[slot])
        ends = self._ends[slot, :count].long()
        length = int(ends[-1]) + 1 if count else first
        follows = next_occurrence(self._text[None, slot, first:length])[0] + first
        order = torch.arange(first, length, device=ends.device)
        pairs = torch.searchsorted(ends, torch.stack([order, follows], dim=1))[follows < length]
        found, number = pairs.unique(dim=0, return_counts=True)
        sizes = ends.diff(prepend=ends.new_tensor([first - 1]))
        share = number / (sizes[found[:, 0]] - GRAM + 1).clamp(min=1) if count else number.float()
        most = (share > MOSTLY) & (found[:, 0] < found[:, 1])
        return found[most], share[most].clamp(max=1).float()
