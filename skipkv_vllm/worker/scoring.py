"""Score the held tokens of a batch of requests: all layers at once if the method can, else one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.device import to_device
from ..core.limits import ceil_div
from ..core.needs import Need
from ..policies import Held, HeldRequest, View
from ..policies.base import Segments
from .cache import KVCache
from .compaction_batch import CompactionBatch
from .ranks import Ranks
from .requests import Job
from .signals.base import Inputs


class Scorer:
    """Computes scores `[R, layers, H, N]` by slot.

    Args:
        cache: the KV cache.
        window: W, number of newest tokens that always survive.
        ranks: this worker's place among those that share the model.
    """

    def __init__(self, cache: KVCache, window: int, ranks: Ranks) -> None:
        self._cache, self._window, self._ranks = cache, window, ranks

    def scores(self, batch: CompactionBatch, inputs: Inputs) -> Tensor:
        """Score every held token, float32 `[R, layers, H, N]` by slot; higher is kept longer."""
        if not batch.policy.is_batched:
            return self.by_layer(batch, inputs)
        held = self._held(batch, inputs)
        return batch.policy.score_batch(held).masked_fill(~held.is_held, -torch.inf)

    def _held(self, batch: CompactionBatch, inputs: Inputs) -> Held:
        scale = self._cache.scale_queries
        ahead = [request.lookahead_queries for _, request in batch.jobs]
        mass, error = _accumulated(batch, inputs)
        return Held(
            self._cache.pages,
            batch.source_table,
            batch.positions,
            [_numbers(job) for job in batch.jobs],
            self._window,
            self._ranks.layer_numbers(len(self._cache.layers)),
            self._ranks.first_head,
            self._cache.key_scales,
            None if inputs.queries is None else scale(inputs.queries),
            None if all(queries is None for queries in ahead) else scale(_together(ahead)),
            inputs.penalties,
            mass,
            error,
            inputs.gates,
            inputs.segments,
            self._sink_logits(batch, inputs),
        )

    def by_layer(self, batch: CompactionBatch, inputs: Inputs) -> Tensor:
        """Score every held token by `Policy.score`, which defines the method, one layer of a request at a time."""
        scores = torch.full(batch.positions.shape, -torch.inf, dtype=torch.float32, device=batch.positions.device)
        for r in range(len(batch.jobs)):
            self._score_request(batch, inputs, r, scores[r])
        return scores

    def _score_request(self, batch: CompactionBatch, inputs: Inputs, r: int, scores: Tensor) -> None:
        """Let the policy score one request layer by layer, in ascending position; `scores` `[layers, H, N]` by slot."""
        order, request = batch.jobs[r]
        policy, length = request.policy, order.num_resident + request.num_question
        by_position = batch.positions[r, ..., :length].argsort(dim=-1)

        def in_order(by_slot: Tensor | None) -> Tensor | None:
            return None if by_slot is None else by_slot[r, ..., :length].gather(-1, by_position)

        positions, penalties, gates = in_order(batch.positions), in_order(inputs.penalties), in_order(inputs.gates)
        mass, error = (in_order(by_slot) for by_slot in _accumulated(batch, inputs))
        assert positions is not None
        pages = batch.source_table[r, : ceil_div(length, self._cache.page_size)].long()
        segments = numbers = None
        if inputs.segments is not None:
            segments = self._segments_of(batch.jobs[r], r, inputs.segments)
            number = (positions - request.protected).div(segments.longest, rounding_mode="floor").clamp(min=-1)
            in_window = positions >= order.num_logical - self._window
            numbers = torch.where(in_window, len(segments.sizes), number).long()
        layer_numbers = self._ranks.layer_numbers(len(self._cache.layers))
        sink_logits = self._sink_logits(batch, inputs)
        for i, layer in enumerate(self._cache.layers):
            keys = values = None
            if policy.needs & Need.KEYS:
                keys = _in_order(self._cache.keys(i, pages, length), by_position[i])
            if policy.needs & Need.VALUES:
                # Their scale, where 8 bits are stored, is one for all tokens and changes no order.
                values = _in_order(layer.values.read_pages(pages, length), by_position[i])
            queries = None if inputs.queries is None else inputs.queries[r, i]
            lookahead = None if request.lookahead_queries is None else request.lookahead_queries[i]
            if request.num_question:
                queries, lookahead = lookahead, None
            view = View(
                positions=positions[i],
                window=self._window,
                num_keep=order.num_keep,
                num_logical=order.num_logical,
                num_prompt=request.num_prompt,
                num_protected=request.protected,
                layer=layer_numbers[i],
                first_head=self._ranks.first_head,
                keys=keys,
                values=values,
                queries=queries,
                sentence_penalty=None if penalties is None else penalties[i],
                attention_mass=None if mass is None else mass[i],
                output_error=None if error is None else error[i],
                segment=None if numbers is None else numbers[i],
                segments=segments,
                gates=None if gates is None else gates[i],
                lookahead_queries=lookahead,
                sink_logits=None if sink_logits is None else sink_logits[i],
            )
            scores[i, :, :length].scatter_(-1, by_position[i], policy.score(view))

    def _sink_logits(self, batch: CompactionBatch, inputs: Inputs) -> Tensor | None:
        """Return the logits of the sinks, float32 `[layers, Hq]`, if there are queries to compute attention with."""
        reads = inputs.queries is not None or any(request.lookahead_queries is not None for _, request in batch.jobs)
        return self._cache.sink_logits if reads else None

    def _segments_of(self, job: Job, r: int, segments: Segments) -> Segments:
        """Return the segments of one request."""
        written = job.order.num_logical - self._window - job.request.protected
        count = ceil_div(written, segments.longest)
        sparsity, memory, sizes = (x[r, :count] for x in (segments.sparsity, segments.memory, segments.sizes))
        return Segments(sparsity, memory, sizes, segments.num_free[r], segments.longest)


def _numbers(job: Job) -> HeldRequest:
    order, request = job
    ahead = request.lookahead_queries
    return HeldRequest(
        order.num_resident + request.num_question,
        order.num_keep,
        order.num_logical,
        request.num_prompt,
        request.protected,
        0 if ahead is None else ahead.shape[1],
    )


def _accumulated(batch: CompactionBatch, inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Return attention mass and output error, float32 `[R, layers, H, N]`; None for what the method does not need."""
    if inputs.sums is None:
        return None, None
    if not batch.policy.needs & Need.OUTPUT_ERROR:
        return inputs.sums[0], None
    error, seen_by = inputs.sums
    return None, error / seen_by.clamp(min=1)


def _together(queries: Sequence[Tensor | None]) -> Tensor:
    """Join queries `[layers, n, Hq, D]` of R requests: `[R, layers, n, Hq, D]`, the shorter ones behind others."""
    lengths = np.array([0 if each is None else each.shape[1] for each in queries])
    ends, most = lengths.cumsum(), int(lengths.max())
    every = torch.cat([each for each in queries if each is not None], dim=1)
    index = to_device((ends[:, None] - most + np.arange(most)).clip(min=0).ravel(), torch.int64, every.device)
    return every.index_select(1, index).unflatten(1, (len(queries), most)).transpose(0, 1)


def _in_order(held: Tensor, by_position: Tensor) -> Tensor:
    """Reorder vectors `[H, L, D]` by slot to `[L, H, D]` in ascending position."""
    return held.gather(1, by_position[..., None].expand_as(held)).transpose(0, 1)
