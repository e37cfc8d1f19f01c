"""Score the held tokens of a batch of requests: by one operator where there is one, else by the policy itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..core.device import to_device
from ..core.limits import ceil_div
from ..core.needs import Need
from ..policies import Measured, View
from .cache import KVCache
from .compaction_batch import CompactionBatch
from .ranks import Ranks
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
        self._score_tokens = ops.function("score_tokens", cache.device)
        self._key_similarity = ops.function("key_similarity", cache.device)

    def scores(self, batch: CompactionBatch, inputs: Inputs) -> Tensor:
        """Score every held token, float32 `[R, layers, H, N]` by slot; higher is kept longer."""
        policy = batch.policy
        if policy.needs & Need.OUTPUT_ERROR:
            return self._ranked(batch, inputs)
        if (fused := policy.token_score) is not None:
            assert inputs.queries is not None
            scores: Tensor = self._score_tokens(
                *self._cache.pages,
                batch.source_table,
                batch.positions,
                batch.num_resident,
                self._cache.scale_queries(inputs.queries),
                inputs.penalties,
                fused.pool,
                fused.mix,
                fused.redundancy_threshold,
            )
            return scores
        scores = torch.full(batch.positions.shape, -torch.inf, dtype=torch.float32, device=batch.positions.device)
        for r in range(len(batch.jobs)):
            self._score_request(batch, inputs, r, scores[r])
        return scores

    def _ranked(self, batch: CompactionBatch, inputs: Inputs) -> Tensor:
        """Rank tokens by what was measured since each was written."""
        policy, device = batch.policy, batch.positions.device
        assert inputs.sums is not None
        error, seen_by = inputs.sums
        recent_from = [
            [[[order.num_logical - policy.num_recent(order.num_keep, request.protected)]]]
            for order, request in batch.jobs
        ]
        resident, below, from_ = (x.view(-1, 1, 1, 1) for x in (batch.num_resident, batch.pin_below, batch.pin_from))
        is_held = torch.arange(batch.length, dtype=torch.int32, device=device) < resident
        measured = Measured(
            error / seen_by.clamp(min=1),
            self._key_similarity(*self._cache.pages, batch.source_table, batch.num_resident, batch.length),
            torch.zeros((), device=device) if inputs.penalties is None else inputs.penalties,
            batch.positions >= to_device(recent_from, torch.int32, device),
            is_held & (batch.positions >= below) & (batch.positions < from_),
        )
        return policy.rank(measured).masked_fill(~is_held, -torch.inf)

    def _score_request(self, batch: CompactionBatch, inputs: Inputs, r: int, scores: Tensor) -> None:
        """Let the policy score one request layer by layer, in ascending position; `scores` `[layers, H, N]` by slot."""
        order, request = batch.jobs[r]
        policy, length = request.policy, order.num_resident + request.num_question
        by_position = batch.positions[r, ..., :length].argsort(dim=-1)

        def in_order(by_slot: Tensor | None) -> Tensor | None:
            return None if by_slot is None else by_slot[r, ..., :length].gather(-1, by_position)

        positions, penalties, gates = in_order(batch.positions), in_order(inputs.penalties), in_order(inputs.gates)
        mass = None if inputs.sums is None else in_order(inputs.sums[0])
        assert positions is not None
        pages = batch.source_table[r, : ceil_div(length, self._cache.page_size)].long()
        segments = None if inputs.segments is None else inputs.segments[r]
        numbers = None
        if segments is not None:
            number = (positions - request.protected).div(segments.longest, rounding_mode="floor").clamp(min=-1)
            in_window = positions >= order.num_logical - self._window
            numbers = torch.where(in_window, len(segments.sizes), number).long()
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
                layer=self._ranks.first_layer + i,
                first_head=self._ranks.first_head,
                keys=keys,
                values=values,
                queries=queries,
                sentence_penalty=None if penalties is None else penalties[i],
                attention_mass=None if mass is None else mass[i],
                segment=None if numbers is None else numbers[i],
                segments=segments,
                gates=None if gates is None else gates[i],
                lookahead_queries=lookahead,
            )
            scores[i, :, :length].scatter_(-1, by_position[i], policy.score(view))


def _in_order(held: Tensor, by_position: Tensor) -> Tensor:
    """Reorder vectors `[H, L, D]` by slot to `[L, H, D]` in ascending position."""
    return held.gather(1, by_position[..., None].expand_as(held)).transpose(0, 1)
