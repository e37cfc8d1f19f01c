"""Inputs of batched scores: the held tokens of several requests in all layers at once, and the operators on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..core.device import to_device
from ..ops.paging import PagedCache
from .view import Segments

WHOLE = 2**30
"""A part that no row exceeds."""


class HeldRequest(NamedTuple):
    """Numbers of a request; see `View`.

    Attributes:
        num_resident: tokens held, with those of a question that was appended.
        num_keep, num_logical, num_prompt, num_protected: as in `View`.
        num_ahead: number of its lookahead queries.
    """

    num_resident: int
    num_keep: int
    num_logical: int
    num_prompt: int = 0
    num_protected: int = 0
    num_ahead: int = 0


@dataclass(frozen=True, eq=False)
class Held:
    """R requests in all layers of a worker, H kv heads, N slots. Tokens are by slot, in no particular order.

    Entries past a request's length are arbitrary, also in what the methods return.

    Attributes:
        pages: KV pages of all layers.
        table: int32 `[R, pages]`, the kernel pages of each request.
        positions: logical positions, int32 `[R, layers, H, N]`.
        requests: numbers of each request, on the host.
        window: W, number of newest tokens, which always survive.
        layers: index in the model of each layer; empty for 0, 1, 2, ...
        first_head: index in the model of the first kv head.
        key_scales: float32 `[layers, H]` by which stored keys must be multiplied, or None for 1.
        queries: the last W post-RoPE queries `[R, layers, W, Hq, D]`, oldest first, times the scale of the keys; None
            unless `Need.QUERIES`.
        lookahead_queries: likewise `[R, layers, n, Hq, D]`; of each request the last `num_ahead` count. None if no
            request has any.
        sentence_penalty, attention_mass, output_error, gates: as in `View`, `[R, layers, H, N]`.
        segments: as in `View`, `[R, S]`.
        sink_logits: float32 `[layers, Hq]`, as in `View`.
    """

    pages: PagedCache
    table: Tensor
    positions: Tensor
    requests: Sequence[HeldRequest]
    window: int
    layers: Sequence[int] = ()
    first_head: int = 0
    key_scales: Tensor | None = None
    queries: Tensor | None = None
    lookahead_queries: Tensor | None = None
    sentence_penalty: Tensor | None = None
    attention_mass: Tensor | None = None
    output_error: Tensor | None = None
    gates: Tensor | None = None
    segments: Segments | None = None
    sink_logits: Tensor | None = None

    def column(self, numbers: Sequence[int]) -> Tensor:
        """Copy a number of each request to the device, int32 `[R, 1, 1, 1]`."""
        return to_device(numbers, torch.int32, self.positions.device).view(-1, 1, 1, 1)

    @functools.cached_property
    def num_resident(self) -> Tensor:
        """Tokens held by each request, int32 `[R]`."""
        return self.column([each.num_resident for each in self.requests]).flatten()

    @functools.cached_property
    def num_logical(self) -> Tensor:
        """Tokens computed so far, int32 `[R, 1, 1, 1]`."""
        return self.column([each.num_logical for each in self.requests])

    @functools.cached_property
    def is_held(self) -> Tensor:
        """Which slots hold a token, bool `[R, 1, 1, N]`."""
        slots = torch.arange(self.positions.shape[-1], dtype=torch.int32, device=self.positions.device)
        return slots < self.num_resident.view(-1, 1, 1, 1)

    @property
    def is_free(self) -> Tensor:
        """Which tokens are neither protected nor in the window, bool `[R, layers, H, N]`; False past the length."""
        protected = self.column([each.num_protected for each in self.requests])
        in_text = (self.positions >= protected) & (self.positions < self.num_logical - self.window)
        return self.is_held & in_text

    def attention(self, effect: ops.Effect = ops.Effect.ATTENTION, counts: Sequence[int] | None = None) -> Tensor:
        """Sum an effect of each token on the newest queries, float32 `[R, layers, H, N]`; see `measure_attention`.

        Args:
            effect: which one.
            counts: how many queries of each request count; by default the window's.
        """
        assert self.queries is not None
        counts = [self.window] * len(self.requests) if counts is None else counts
        return self._attention(self.queries, counts, [each.num_logical - 1 for each in self.requests], effect)

    def attention_ahead(self, effect: ops.Effect = ops.Effect.ATTENTION) -> Tensor:
        """Sum an effect of each token on the lookahead queries; 0 for requests without any.

        Queries of a question that was appended see its tokens, others all tokens.
        """
        assert self.lookahead_queries is not None
        counts = [each.num_ahead for each in self.requests]
        newest = [each.num_logical - 1 + each.num_ahead for each in self.requests]
        return self._attention(self.lookahead_queries, counts, newest, effect)

    def _attention(self, queries: Tensor, counts: Sequence[int], newest: Sequence[int], effect: ops.Effect) -> Tensor:
        measure = ops.function("measure_attention", self.positions.device, self.pages.layout)
        most = max(1, *counts)
        found: Tensor = measure(
            *(*self.pages, self.table, self.positions, self.num_resident, queries[:, :, -most:]),
            *(self.column(counts).flatten(), self.column(newest).flatten(), self.sink_logits, int(effect), 0.0),
        )
        return found

    def key_norms(self, part: int = 0) -> Tensor:
        """Compute the length of each key, float32 `[R, layers, H, N]`.

        Args:
            part: take the distance from a mean instead, which so many tokens share that follow each other in ascending
                position; `WHOLE` for the mean of the row.
        """
        norms = self._norms(False, 2, part, None)
        return norms if self.key_scales is None else norms * self.key_scales[:, :, None]

    def value_sums(self) -> Tensor:
        """Compute the l1 norm of each value, float32 `[R, layers, H, N]`; without the scale of a quantised cache."""
        return self._norms(True, 1, 0, None)

    def value_distances(self, weights: Tensor | None) -> Tensor:
        """Compute the distance of each value from a weighted sum of all; without the scale of a quantised cache.

        Args:
            weights: float32 `[R, layers, H, N]`; None for the mean.
        """
        return self._norms(True, 2, WHOLE, weights)

    def _norms(self, values: bool, norm: int, part: int, weights: Tensor | None) -> Tensor:
        measure = ops.function("vector_norms", self.positions.device, self.pages.layout)
        found: Tensor = measure(
            *(*self.pages, self.table, self.positions, self.num_resident), values, norm, part, weights
        )
        return found

    def key_similarity(self) -> Tensor:
        """Compute the cosine of each key with the mean unit key of its row, float32 `[R, layers, H, N]`."""
        compare = ops.function("key_similarity", self.positions.device, self.pages.layout)
        found: Tensor = compare(*self.pages, self.table, self.num_resident, self.positions.shape[-1])
        return found

    def pooled(self, scores: Tensor, pool: int) -> Tensor:
        """Max-pool scores over `pool` neighbours in ascending position that are older than the window, which gets 0."""
        run = ops.function("pool_neighbours", self.positions.device)
        found: Tensor = run(scores, self.positions, self.num_resident, self.window, pool)
        return found

    def token_scores(self, pool: int, mix: float, threshold: float) -> Tensor:
        """Compute importance against redundancy less the penalty, float32 `[R, layers, H, N]`; see `score_tokens`."""
        assert self.queries is not None
        score = ops.function("score_tokens", self.positions.device, self.pages.layout)
        found: Tensor = score(
            *(*self.pages, self.table, self.positions, self.num_resident, self.queries, self.sentence_penalty),
            *(pool, mix, threshold),
        )
        return found

    def central_tokens(self, quota: Tensor) -> Tensor:
        """Select the tokens whose keys are central to their segment, bool `[R, layers, H, N]`.

        Args:
            quota: int64 `[R, S]`, tokens to select in each segment; see `central_tokens` in `ops`.
        """
        assert self.segments is not None
        choose = ops.function("central_tokens", self.positions.device, self.pages.layout)
        begin = self.column([each.num_protected for each in self.requests]).flatten()
        end = self.column([each.num_logical - self.window for each in self.requests]).flatten()
        found: Tensor = choose(
            *(*self.pages, self.table, self.positions, self.num_resident, begin, end, quota.int()),
            self.segments.longest,
        )
        return found
