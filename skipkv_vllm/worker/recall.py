"""Bring evicted tokens back when recent queries ask for them.

They take the slots of tokens that the method values least, the region of a request. Counts alone decide when that
happens, and how many tokens at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..core.device import padded, to_device
from ..core.limits import BEFORE_END
from ..core.needs import NUM_ASKING
from ..core.orders import Compaction, Stored, Swap
from ..core.reports import RecalledTokens
from .cache import KVCache, Room
from .compaction_batch import CompactionBatch
from .ranks import Ranks
from .regions import best, marked, placed
from .requests import Job, ManagedRequest, Region
from .signals import Signals

BEFORE, BEHIND = 4, 12
"""Tokens that come back with one that is asked for, if they are of its sentence: most from behind it, because what
followed it then is needed next now."""

BASE = 4.0
"""Weight from which a head gives evidence, times the number of stored tokens."""

PRIOR = 16
"""Heads that are taken to lack each token and not to ask for it, so that what few heads say counts little."""

FOR_ANSWER = 0.5
"""Share of the threshold that is enough at the end of a prompt, because a question may be there."""

NUM_ANSWERING = 32
"""Decoded tokens for which that holds, too, and for which what the question found stays: it must be read first."""

OPERATORS = ("key_moments", "store_tokens", "recall_tokens", "stored_attention")

EXCHANGE_BYTES = 48
"""Most temporary memory of an exchange for each stored token, layer and kv head."""

SMALLEST_SPREAD = 1e-6
"""Lower bound of the spread of a key's elements."""


class Exchange(NamedTuple):
    """A request whose tokens may come back now.

    Attributes:
        order: what is carried out.
        request: its request.
        stored: its tokens in the store.
        num_keep: tokens held since the last compaction, in the first slots.
        place: its place in the batch of a compaction.
    """

    order: Compaction | Swap
    request: ManagedRequest
    stored: Stored
    num_keep: int
    place: int = 0

    @property
    def num_asking(self) -> int:
        """Queries that ask."""
        return min(NUM_ASKING, self.order.num_logical)

    @property
    def may_answer(self) -> bool:
        """Whether a question may have been asked just now."""
        return self.order.num_logical < self.request.num_prompt + NUM_ANSWERING

    @property
    def is_within_prompt(self) -> bool:
        """Whether so much of the prompt is left that others will be asked for at its end."""
        return self.order.num_logical < self.request.num_prompt - BEFORE_END[0]

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What requests that are handled together have in common; the second is the size of their regions."""
        return self.num_keep, min(self.stored.number, self.num_keep), self.num_asking, self.is_within_prompt


class Sums:
    """Sums on the device that the host reads without waiting.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(RecalledTokens._fields), dtype=torch.float64, device=device)
        self._on_host = torch.zeros_like(self._sums, device="cpu", pin_memory=device.type != "cpu")
        self._copied: torch.Event | None = None
        self._known: RecalledTokens | None = None

    def add(self, amounts: Tensor) -> None:
        """Add one number to each sum, and copy the sums to the host unless a copy is under way."""
        self._sums += amounts
        if self._sums.device.type == "cpu":
            self._known = RecalledTokens(*self._sums.tolist())
            return
        self.read()
        if self._copied is None:
            self._on_host.copy_(self._sums, non_blocking=True)
            self._copied = torch.Event(self._sums.device)
            self._copied.record()

    def read(self) -> RecalledTokens | None:
        """Return the sums as they were copied last; None if no copy is complete."""
        if self._copied is not None and self._copied.query():
            self._copied = None
            self._known = RecalledTokens(*self._on_host.tolist())
        return self._known


class Recall:
    """Copies tokens to the store, and back into regions.

    Args:
        cache: the KV cache.
        stored: pages of the store `[S, layers, H, STORED_PAGE, 2 * D]`, of the cache's dtype, as the device sees them.
        signals: queries and sentences of the requests.
        ranks: this worker's place among those that share the model.
        num_rows: requests that can run at once.
        threshold: evidence from which tokens come back.
    """

    def __init__(
        self,
        cache: KVCache,
        stored: Tensor,
        signals: Signals,
        ranks: Ranks,
        num_rows: int,
        threshold: float,
    ) -> None:
        self._cache, self._signals, self._ranks = cache, signals, ranks
        self._threshold = threshold
        key_size, device, layout = cache.key_size, cache.device, cache.pages.layout
        self._stored = stored
        self._sums = Sums(device)
        self._signs = torch.zeros(*stored.shape[:-1], key_size // 8, dtype=torch.uint8, device=device)
        self._sizes = torch.zeros(stored.shape[:-1], dtype=torch.float32, device=device)
        self._moments = torch.zeros(2, num_rows, *stored.shape[1:3], key_size, dtype=torch.float32, device=device)
        ops.warn_if_slow(device.type, layout, OPERATORS)
        self._key_moments = ops.function("key_moments", device, layout)
        self._store_tokens = ops.function("store_tokens", device, layout)
        self._recall_tokens = ops.function("recall_tokens", device, layout)
        self._stored_attention = ops.function("stored_attention", device)

    @property
    def num_pages(self) -> int:
        """Pages of the store."""
        return self._stored.shape[0]

    def reset_counts(self) -> None:
        """Forget how many tokens came back."""
        self._sums = Sums(self._cache.device)

    def counts(self) -> RecalledTokens | None:
        """Return how many tokens came back. Nothing waits for the device, so that may be some steps old."""
        return self._sums.read()

    def store(self, jobs: Sequence[Job]) -> None:
        """Store what these requests have computed since their last compaction, before they are compacted."""
        for order, request in jobs:
            if order.stored is not None:
                self._store(order, request, order.stored)

    def _store(self, order: Compaction, request: ManagedRequest, stored: Stored) -> None:
        device, table = self._cache.device, self._cache.table([order.source_blocks])
        if not request.is_sketched:
            span = to_device([[request.protected], [order.num_resident]], torch.int32, device)
            self._moments[:, request.row] = self._key_moments(*self._cache.pages, table, *span)[:, 0]
            self._moments[1, request.row].clamp_(min=SMALLEST_SPREAD)
            request.is_sketched = True
        place, number = stored.begin - stored.first, stored.end - stored.begin
        self._store_tokens(
            *(*self._cache.pages, table),
            to_device([[stored.begin - order.num_evicted_before, number, place]], torch.int32, device),
            to_device([stored.pages], torch.int32, device),
            *self._moments[:, request.row : request.row + 1],
            *(self._stored, self._signs, self._sizes),
        )
        # Nothing is left of a request that had the last page before; the other pages were written as a whole.
        self._stored[stored.pages[-1], :, :, (stored.num_tokens - 1) % self._stored.shape[3] + 1 :] = 0

    def after_compaction(self, batch: CompactionBatch, scores: Tensor) -> None:
        """Note in which slots tokens may come back, those that the method values least, and let them.

        Args:
            batch: the requests, which have been compacted.
            scores: float32 `[R, layers, H, N]` of the tokens that stayed, by slot.
        """
        exchanges = [
            Exchange(order, request, order.stored, order.num_keep, r)
            for r, (order, request) in enumerate(batch.jobs)
            if order.stored is not None
        ]
        for part in in_parts(exchanges, self._cache.room):
            num_keep, width = part[0].shape[:2]
            at = to_device([each.place for each in part], torch.int64, self._cache.device)
            table, positions = self._held(part)
            is_free = positions >= batch.pin_below[at].view(-1, 1, 1, 1)
            is_free &= positions < batch.pin_from[at].view(-1, 1, 1, 1)
            # Of equal scores the lower position stays longer.
            by_position = positions.argsort(dim=-1, descending=True)
            worth = scores[at][..., :num_keep].masked_fill(~is_free, torch.inf).gather(-1, by_position)
            regions = by_position.gather(-1, worth.sort(dim=-1, stable=True).indices[..., :width])
            for each, region, owners in zip(part, regions, positions.gather(-1, regions), strict=True):
                # A view would keep the tensor of the whole part.
                each.request.region, each.request.owner_sums = Region(region.clone(), owners.clone()), None
            if not part[0].is_within_prompt:
                self._exchange(part, table, positions)

    def swap(self, jobs: Sequence[tuple[Swap, ManagedRequest]]) -> None:
        """Let other tokens come back; those that nobody asks for any more leave their slots to the owners."""
        exchanges = [Exchange(order, request, order.stored, request.num_placed) for order, request in jobs]
        for part in in_parts(exchanges, self._cache.room):
            self._exchange(part, *self._held(part))

    def _held(self, part: Sequence[Exchange]) -> tuple[Tensor, Tensor]:
        """Return the kernel pages of R requests, and the positions held since the last compaction; see `_exchange`."""
        table = self._cache.table([each.order.after[1] for each in part])
        placed = to_device([[each.num_keep for each in part], [0] * len(part)], torch.int32, self._cache.device)
        return table, self._cache.positions(table, part[0].num_keep, *placed)

    def _exchange(self, part: Sequence[Exchange], table: Tensor, positions: Tensor) -> None:
        """Give the slots of the regions to tokens that are asked for, and the others back to their owners.

        What is asked for comes first, then what the method values more.

        Args:
            part: R requests of one shape.
            table: int32 `[R, pages]`, their kernel pages.
            positions: int32 `[R, layers, H, num_keep]`, held since the last compaction, by slot.
        """
        device, regions = positions.device, [each.request.region for each in part]
        slots, owners = (torch.stack(each) for each in zip(*regions, strict=True))
        numbers = [each.stored.num_tokens for each in part]
        first, number = to_device([[each.stored.first for each in part], numbers], torch.int32, device)
        length, most = max(numbers), slots.shape[-1]
        stored_table = to_device(padded([each.stored.pages for each in part]), torch.int32, device)
        start = first.view(-1, 1, 1, 1)
        # Tokens that have no place, because they are protected or were dropped, mark the one behind the last.
        held, owner = (torch.where(each < start, length, each - start).long() for each in (positions, owners))
        present = held.gather(-1, slots)
        is_kept = marked(held, length).scatter(-1, present, False)
        asked = self._asked(part, stored_table, first, number, ~is_kept[..., :-1])
        remember(part, asked)
        asked = F.pad(asked, (0, 1))[:, None, None]
        needed = [self._threshold * (FOR_ANSWER if each.may_answer else 1.0) for each in part]
        is_asked = asked >= to_device(needed, torch.float32, device).view(-1, 1, 1, 1)
        is_wanted = best(asked.where(is_asked & ~is_kept, 0.0), owner, min(needed))
        after = placed(is_wanted, owner, present)
        is_new, was_owner, is_owner = after != present, present == owner, after == owner
        self._recall_tokens(
            *(*self._cache.pages, self._cache.sidecar, table, slots.int()),
            *(torch.where(is_new, after, -1).int(), first, stored_table, self._stored),
        )
        if self._signals.attention_mass is not None:
            order = torch.arange(most, device=device).expand(present.shape)
            came_from = torch.full(is_kept.shape, -1, device=device).scatter_(-1, present, order).gather(-1, after)
            came_from = came_from.where(is_new, order)
            for r, each in enumerate(part):
                self._signals.attention_mass.exchange(each.request, came_from[r], was_owner[r], is_owner[r])
        used = ~was_owner & is_asked.expand(is_kept.shape).gather(-1, present)
        counts = torch.stack([is_new & ~is_owner, ~was_owner, used])
        self._sums.add(counts.sum(-1, dtype=torch.float64).mean(dim=(2, 3)).sum(dim=1))

    def _asked(
        self, part: Sequence[Exchange], stored_table: Tensor, first: Tensor, number: Tensor, is_lacking: Tensor
    ) -> Tensor:
        """Return the evidence that recent queries ask for each stored token, float32 `[R, N]`, 0 beyond the last one.

        A head gives evidence if a query attends to the token more than `BASE` times as much as to the mean one: the
        logarithm of the excess. The evidence for a token is the mean over the layers and heads of all ranks that lack
        it, and no less than that for a token near it, of its sentence.

        Args:
            part: R requests.
            stored_table: int32 `[R, Q]`, pages of the store.
            first, number: int32 `[R]`, position of the first stored token, and number of stored ones.
            is_lacking: bool `[R, layers, H, N]`, heads in which a token is missing or has come back.
        """
        ring, sentences = self._signals.queries, self._signals.sentences
        assert ring is not None
        assert sentences is not None
        length, rows = is_lacking.shape[-1], [each.request.row for each in part]
        lengths = [each.order.num_logical for each in part]
        queries = self._cache.scale_queries(ring.newest(rows, lengths, part[0].num_asking))
        on_device = to_device(rows, torch.int64, is_lacking.device)
        spread = self._moments[1, on_device]
        spread = spread.repeat_interleave(queries.shape[3] // spread.shape[2], dim=2)
        weights: Tensor = self._stored_attention(
            *(self._signs, self._sizes, stored_table, number, queries.float() * spread[:, :, None], length)
        )
        lacking = is_lacking.float()
        excess = weights.mul_(number.view(-1, 1, 1, 1) / BASE).clamp_(min=1.0).log_().mul_(lacking)
        total, share = self._ranks.mean(torch.cat([excess, lacking])).chunk(2)
        num_heads = self._ranks.num_pairs or lacking[0, ..., 0].numel()
        evidence = total / (share + PRIOR / num_heads)
        sentence = sentences.numbers_from(on_device, first, length)
        # The first numbers may belong to tokens that were dropped from the store.
        sentence = sentence - sentence[:, :1]
        of_sentence = torch.zeros_like(evidence).scatter_reduce_(1, sentence, evidence, "amax").gather(1, sentence)
        near = F.max_pool1d(F.pad(evidence, (BEHIND, BEFORE)), BEFORE + BEHIND + 1, stride=1)
        is_stored = torch.arange(length, device=number.device) < number[:, None]
        return of_sentence.minimum(near).mul_(is_stored)


def remember(part: Sequence[Exchange], asked: Tensor) -> None:
    """Raise the evidence to what it was at earlier exchanges around the same question, and note it for the next one.

    Args:
        part: R requests.
        asked: float32 `[R, N]`, evidence by place.
    """
    for r, each in enumerate(part):
        if not each.may_answer:
            each.request.question = None
            continue
        if each.request.question is not None:
            first, evidence = each.request.question
            known = evidence[each.stored.first - first :]
            torch.maximum(asked[r, : len(known)], known, out=asked[r, : len(known)])
        each.request.question = each.stored.first, asked[r, : each.stored.num_tokens].clone()


def in_parts(exchanges: Sequence[Exchange], room: Room) -> Iterator[list[Exchange]]:
    """Split exchanges into parts of one shape that one launch may carry out; see `compaction_batch.independent`."""
    by_shape: dict[tuple[int, ...], list[Exchange]] = {}
    for each in sorted(exchanges, key=lambda each: each.stored.num_tokens):
        by_shape.setdefault(each.shape, []).append(each)
    for alike in by_shape.values():
        part: list[Exchange] = []
        for each in alike:
            longest = max(each.stored.num_tokens, each.num_keep)
            if part and not room.holds(len(part) + 1, longest, each.num_asking):
                yield part
                part = []
            part.append(each)
        yield part
