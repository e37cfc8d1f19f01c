"""Bring evicted tokens back when recent queries ask for them.

They take the slots of tokens that the method values least, the region of a request. Counts alone decide when that
happens, and how many tokens at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..core.device import to_device
from ..core.needs import NUM_ASKING
from ..core.orders import Compaction, Stored, Swap
from ..core.reports import RecalledTokens
from .cache import KVCache
from .compaction_batch import CompactionBatch
from .ranks import Ranks
from .requests import Job, ManagedRequest
from .signals import Signals

BEFORE, BEHIND = 4, 12
"""Tokens that come back with one that is asked for, if they are of its sentence: most from behind it, because what
followed it then is needed next now."""

BASE = 4.0
"""Weight from which a head gives evidence, times the number of stored tokens."""

PRIOR = 16
"""Heads that are taken to lack each token and not to ask for it, so that what few heads say counts little."""

OPERATORS = ("key_moments", "store_tokens", "recall_tokens", "stored_attention")

EXCHANGE_BYTES = 48
"""Most temporary memory of an exchange for each stored token, layer and kv head."""

SMALLEST_SPREAD = 1e-6
"""Lower bound of the spread of a key's elements."""


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
        """Let tokens come back in place of those that the method values least.

        Args:
            batch: the requests, which have been compacted.
            scores: float32 `[R, layers, H, N]` of the tokens that stayed, by slot.
        """
        for r, (order, request) in enumerate(batch.jobs):
            if order.stored is None:
                continue
            positions = self._cache.positions_of(order.target_blocks, order.num_keep, order.num_keep, 0)
            is_free = (positions >= batch.pin_below[r]) & (positions < batch.pin_from[r])
            # Of equal scores the lower position stays longer.
            by_position = positions.argsort(dim=-1, descending=True)
            worth = scores[r, ..., : order.num_keep].masked_fill(~is_free, torch.inf).gather(-1, by_position)
            lowest = worth.sort(dim=-1, stable=True).indices[..., : order.stored.number]
            request.region = by_position.gather(-1, lowest)
            request.num_recalled = torch.zeros_like(request.region[..., :1])
            self._exchange(order, request, order.stored, positions)

    def swap(self, order: Swap, request: ManagedRequest) -> None:
        """Let other tokens come back, in place of those that came back before, or that the method values least."""
        num_keep = request.num_placed
        self._exchange(order, request, order.stored, self._cache.positions_of(order.blocks, num_keep, num_keep, 0))

    def _exchange(self, order: Compaction | Swap, request: ManagedRequest, stored: Stored, positions: Tensor) -> None:
        """Write tokens that are asked for into the region, in place of those that are asked for less.

        Args:
            order: the order.
            request: its request.
            stored: what is in the store.
            positions: int32 `[layers, H, num_keep]`, held since the last compaction, by slot.
        """
        region, number, threshold = request.region, stored.num_tokens, self._threshold
        assert region is not None
        assert request.num_recalled is not None
        # Tokens that have no place, because they are protected or were dropped, mark the one behind the last.
        held = positions.long() - stored.first
        held = torch.where(held < 0, number, held)
        in_region, most = held.gather(-1, region), region.shape[-1]
        is_held = torch.zeros(*held.shape[:2], number + 1, dtype=torch.bool, device=held.device).scatter_(
            -1, held, True
        )
        is_kept = is_held.scatter(-1, in_region, False)
        asked = self._asked(order, request, stored, ~is_kept[..., :-1]).expand(*held.shape[:2], -1)
        own = F.pad(asked, (0, 1)).gather(-1, in_region)
        in_order = torch.arange(most, device=own.device)
        is_used = (own >= threshold) & (in_order < request.num_recalled)
        # In the region, tokens that are not asked for come first, in their order.
        own, order_of_slots = torch.where(own >= threshold, own, in_order / most - 1).sort(dim=-1, stable=True)
        coming = asked.masked_fill(is_held[..., :-1], 0.0)
        evidence, place = _largest(F.pad(coming, (0, max(0, most - number))), most)
        is_new = (evidence >= threshold) & (evidence > own)
        slots = region.gather(-1, order_of_slots)
        self._recall_tokens(
            *(*self._cache.pages, self._cache.sidecar, self._cache.table([order.after[1]]), slots[None].int()),
            torch.where(is_new, place, -1)[None].int(),
            to_device([stored.first], torch.int32, self._cache.device),
            *(to_device([stored.pages], torch.int32, self._cache.device), self._stored),
        )
        if self._signals.attention_mass is not None:
            self._signals.attention_mass.clear(request, slots, is_new)
        # What came back is the first to be replaced; the others stay in order.
        came = torch.zeros_like(is_new).scatter_(-1, order_of_slots, is_new)
        request.region = region.gather(-1, (~came).byte().sort(dim=-1, stable=True).indices)
        checked, request.num_recalled = request.num_recalled, came.sum(-1, keepdim=True)
        counts = (request.num_recalled.double(), checked.double(), is_used.sum(-1).double())
        self._sums.add(torch.stack([each.mean() for each in counts]))

    def _asked(self, order: Compaction | Swap, request: ManagedRequest, stored: Stored, is_lacking: Tensor) -> Tensor:
        """Return the evidence that recent queries ask for each stored token, float32 `[num_tokens]`.

        A head gives evidence if a query attends to the token more than `BASE` times as much as to the mean one: the
        logarithm of the excess. The evidence for a token is the mean over the layers and heads of all ranks that lack
        it, and no less than that for a token near it, of its sentence.

        Args:
            order, request, stored: see `_exchange`.
            is_lacking: bool `[layers, H, num_tokens]`, heads in which a token is missing or has come back.
        """
        ring, sentences = self._signals.queries, self._signals.sentences
        assert ring is not None
        assert sentences is not None
        device, number = self._cache.device, stored.num_tokens
        count = min(NUM_ASKING, order.num_logical)
        queries = self._cache.scale_queries(ring.newest([request.row], [order.num_logical], count))
        spread = self._moments[1, request.row]
        spread = spread.repeat_interleave(queries.shape[3] // spread.shape[1], dim=1)
        weights: Tensor = self._stored_attention(
            *(self._signs, self._sizes, to_device([stored.pages], torch.int32, device)),
            *(to_device([number], torch.int32, device), queries.float() * spread[:, None], number),
        )
        lacking = is_lacking.float()
        excess = weights[0].mul_(number / BASE).clamp_(min=1.0).log_().mul_(lacking)
        total, share = self._ranks.mean(torch.stack([excess, lacking]))
        num_heads = self._ranks.num_pairs or lacking[..., 0].numel()
        evidence = total / (share + PRIOR / num_heads)
        sentence = sentences.numbers_between(request.row, stored.first, stored.end, device)
        # The first numbers may belong to tokens that were dropped from the store.
        sentence = sentence - sentence[0]
        of_sentence = torch.zeros_like(evidence).scatter_reduce_(0, sentence, evidence, "amax")[sentence]
        near = F.max_pool1d(F.pad(evidence, (BEHIND, BEFORE))[None], BEFORE + BEHIND + 1, stride=1)[0]
        return of_sentence.minimum(near)


def _largest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the largest of values `[..., N]` >= 0 and their places, descending; of equal ones the first comes first.

    A stable sort would do the same, in several times the time.
    """
    # The bits of floating-point numbers that are not negative are in the order of the numbers.
    behind = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    largest = (values.view(torch.int32).long() << 32 | behind).topk(number, dim=-1).values
    return (largest >> 32).int().view(torch.float32), values.shape[-1] - 1 - (largest & 0x7FFFFFFF)
