"""The sentence tracker: finds sentences and their embeddings on the device while they are written.

After each forward pass it reads the step's token ids and last hidden states. The host never learns how many sentences
there are, so it never waits; all shapes follow from token counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...core.device import to_device
from ...policies.base import SentenceOptions
from ...sentences.recurrence import GRAM, next_occurrence, repeated_shares
from ...sentences.tables import SentenceTables

OPEN = torch.iinfo(torch.int32).max
"""End of a sentence that is not closed yet."""

MOSTLY = 0.5
"""Share of a sentence's phrases that recur in one later sentence, above which a trace calls it repeated."""


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Look up entries of a table `[R, longest]` by logical position, for positions `[R, L, H, N]` of its requests."""
    # Positions beyond a shorter request's tokens are arbitrary, but must lie within the table.
    flat = positions.flatten(1).clamp(0, table.shape[1] - 1).long()
    return table.gather(1, flat).view(positions.shape)


def _numbers(ends: Tensor, first: Tensor | int, positions: Tensor) -> Tensor:
    number = torch.searchsorted(ends, positions.contiguous()) + 1
    return torch.where(positions >= first, number, 0)


class SentenceState(NamedTuple):
    """The sentences of one request. S is the longest possible sequence.

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
        """Return the number of the sentence that contains each position, from 1; 0 for tokens before `first`.

        The open sentence has the next free number.
        """
        return _numbers(self.ends, self.first, positions)


class TrackedTokens(NamedTuple):
    """The tokens of one step that belong to sentences, of R requests.

    Attributes:
        token_ids: integer `[T]`, all tokens of the step.
        spans: int64 `[4, R]`: row, first token in the step, number of tokens, position of the first token.
        num_tokens: sum of the numbers; for kernels at least as much.
        hidden: last hidden states `[T, E]` (after the final norm), or None without embeddings.
    """

    token_ids: Tensor
    spans: Tensor
    num_tokens: int
    hidden: Tensor | None


class SentenceTracker:
    """Sentence state of all running requests by row, in persistent buffers.

    Args:
        tables: sentence tables of the tokenizer.
        options: similarity threshold and number of embeddings kept per request.
        num_rows: requests that can run at once.
        max_length: longest sequence, in tokens.
        hidden_size: E; 0 if no policy needs embeddings.
        vocab_size: number of token ids.
        dtype: dtype of the stored embeddings.
        device: where the model runs.
        keeps_text: whether sentences are compared by their words; excludes embeddings.

    Attributes:
        needs_number: whether `update` needs the exact number of tokens on the host.
    """

    def __init__(
        self,
        tables: SentenceTables,
        options: SentenceOptions,
        *,
        num_rows: int,
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
        self._first = [0] * num_rows
        size = max(vocab_size, max(tables.delimiters) + 1)
        self._is_delimiter = torch.zeros(size, dtype=torch.bool, device=device)
        self._is_delimiter[torch.tensor(sorted(tables.delimiters), device=device)] = True
        # The last column of `_ends` and `_penalties` and the last entry of `_embeddings` take writes that must have no
        # effect: masking by boolean index would make the host wait for the device.
        self._ends = torch.full((num_rows, max_length + 1), OPEN, dtype=torch.int32, device=device)
        self._penalties = torch.zeros(num_rows, max_length + 1, dtype=torch.float32, device=device)
        self._text = torch.zeros(num_rows, max_length + 1 if keeps_text else 0, dtype=torch.int32, device=device)
        self._count = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._compared = torch.zeros_like(self._count)
        self._first_of = torch.zeros_like(self._count)
        self._after_delimiter = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._open_length = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self._open_sum = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device)
        kept = options.max_sentences if self.has_embeddings else 0
        self._embeddings = torch.zeros(num_rows, kept + 1, hidden_size, dtype=dtype, device=device)
        self._kept_order = torch.arange(kept, dtype=torch.int64, device=device)
        self._track = ops.function("track_sentences", device)
        # Kernels read how many tokens each request has; on a CPU nobody waits for the sum.
        self.needs_number = device.type == "cpu" or ops.report(device.type)["track_sentences"].backend == "torch"
        self._similarity = ops.function("sentence_similarity", device)
        self._look_up = ops.function("token_penalties", device)

    @property
    def compares(self) -> bool:
        """Whether it finds out which sentences are repeated."""
        return self.has_embeddings or self.keeps_text

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def reset(self, row: int, first: int) -> None:
        """Clear a row for a new or resumed request, tracked from position `first`."""
        self._first[row] = first
        self._first_of[row] = first
        self._ends[row].fill_(OPEN)
        self._penalties[row].zero_()
        self._count[row] = 0
        self._compared[row] = 0
        self._after_delimiter[row] = False
        self._open_length[row] = 0
        self._open_sum[row].zero_()

    def update(self, tokens: TrackedTokens) -> None:
        """Read the tokens of one step."""
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

    def state(self, row: int) -> SentenceState:
        """Return a request's sentences with up-to-date penalties."""
        self._compare(to_device([row], torch.int64, self._count.device))
        return SentenceState(self._first[row], self._ends[row], self._penalties[row])

    def sentences_of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the sentence number of each position `[R, N]`; see `SentenceState.sentence_of`."""
        return _numbers(self._ends[rows], self._first_of[rows, None], positions)

    def penalties(self, rows: Tensor, positions: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Return how much later text repeats the sentence of each token: float32, of the shape of the positions.

        Args:
            rows: integer `[R]`, rows of the requests.
            positions: int32 `[R, L, H, N]`; see `token_penalties` in `ops`.
            lengths: integer `[R]`, logical lengths.
            longest: the longest of them.
        """
        rows = rows.long()
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

    def _compare(self, rows: Tensor) -> None:
        """Compare sentences closed since the last comparison with earlier ones."""
        if self.has_embeddings:
            rule = ops.RULES.index(self.tables.penalty_rule)
            self._similarity(
                self._embeddings,
                rows,
                self._count,
                self._compared,
                self._penalties,
                self.options.similarity_threshold,
                rule,
            )

    def _held(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of the sentences whose embeddings are kept, oldest first, and which of them exist."""
        number = (self._count[row] - self.options.max_sentences).clamp(min=0) + self._kept_order
        return number, number < self._count[row]

    def similar_pairs(self, row: int) -> tuple[Tensor, Tensor]:
        """Return pairs (earlier, later) of repeated sentences, int64 `[P, 2]`, and by how much, float32 `[P]`.

        By embeddings: pairs whose cosine is above the threshold, and the cosine. By words: pairs whose later sentence
        repeats more than `MOSTLY` of the earlier one, and that share. For traces: it covers only sentences whose
        embeddings are kept, and makes the host wait.
        """
        if self.keeps_text:
            return self._repeated_pairs(row)
        number, exists = self._held(row)
        unit = self._embeddings[row, number % self.options.max_sentences].float()
        cosine = unit @ unit.T
        found = ((cosine > self.options.similarity_threshold) & exists & exists[:, None]).triu(1)
        return number[found.nonzero()], cosine[found]

    def _repeated_pairs(self, row: int) -> tuple[Tensor, Tensor]:
        """See `similar_pairs`: share of phrases that begin in the earlier sentence and occur next in the later one."""
        first, count = self._first[row], int(self._count[row])
        ends = self._ends[row, :count].long()
        length = int(ends[-1]) + 1 if count else first
        follows = next_occurrence(self._text[None, row, first:length])[0] + first
        order = torch.arange(first, length, device=ends.device)
        pairs = torch.searchsorted(ends, torch.stack([order, follows], dim=1))[follows < length]
        found, number = pairs.unique(dim=0, return_counts=True)
        sizes = ends.diff(prepend=ends.new_tensor([first - 1]))
        share = number / (sizes[found[:, 0]] - GRAM + 1).clamp(min=1) if count else number.float()
        most = (share > MOSTLY) & (found[:, 0] < found[:, 1])
        return found[most], share[most].clamp(max=1).float()
