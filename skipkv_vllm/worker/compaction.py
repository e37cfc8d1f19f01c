"""Carry out the compactions of a step: score, select and move, for all requests and layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..config import KVPolicyConfig
from ..core.device import to_device
from ..ops.paging import PagedCache
from ..policies.selection import select_sentences
from .cache import KVCache
from .compaction_batch import CompactionBatch, Moves, independent
from .ranks import ALONE, Ranks
from .recall import Recall
from .requests import Job
from .scoring import Scorer
from .signals import Signals
from .signals.base import Inputs


class Compactor:
    """Chooses survivors and moves them to the front of each request's blocks.

    Args:
        config: the server's policy.
        cache: the KV cache.
        signals: what is collected for policies.
        ranks: this worker's place among those that share the model.
        draft_pages: pages of each layer of a drafter. They keep the tokens that the model's last layer keeps, because
            drafts change no output, and a drafter's queries may have another shape.
        recall: brings evicted tokens back, or None.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        cache: KVCache,
        signals: Signals,
        ranks: Ranks = ALONE,
        draft_pages: Sequence[PagedCache] = (),
        recall: Recall | None = None,
    ) -> None:
        self.recall = recall
        self.config = config
        self.cache = cache
        self._signals = signals
        self._ranks = ranks
        self._draft_pages = draft_pages
        self._scorer = Scorer(cache, config.kv_window, ranks)
        self._select_keep = ops.function("select_keep", cache.device)
        self._compact_pages = ops.function("compact_pages", cache.device, cache.pages.layout)
        ops.warn_if_slow(cache.device.type, cache.pages.layout)

    def run(self, jobs: Sequence[Job]) -> None:
        """Carry out the compactions of a step, in order."""
        for part in independent(jobs, self.cache.block_size, self.cache.room, self.config.kv_window):
            self._run(part)

    def _run(self, jobs: Sequence[Job]) -> None:
        if self.recall is not None:
            self.recall.store(jobs)
        batch, inputs = CompactionBatch.of(jobs, self.cache, self.config.kv_window), Inputs()
        for signal in self._signals:
            signal.read(batch, inputs)
        scores = self._scorer.scores(batch, inputs)
        if self.config.kv_granularity == "head":
            moves = self._select_tokens(batch, scores)
        else:
            # All layers and heads of all ranks hold the same tokens.
            scores = self._ranks.mean(scores)[:, None, None].expand_as(scores)
            moves = self._select_sentences(batch, scores)
        self._compact_pages(
            *self.cache.pages,
            self.cache.sidecar,
            batch.positions,
            batch.source_table,
            batch.target_table,
            batch.num_keep,
            *moves,
        )
        for pages in self._draft_pages:
            # The positions are those of the last layer, which are written once more.
            self._compact_pages(
                *pages,
                self.cache.sidecar[-1:],
                batch.positions[:, -1:].contiguous(),
                batch.source_table,
                batch.target_table,
                batch.num_keep,
                *(each[:, -1:].contiguous() for each in moves),
            )
        for signal in self._signals:
            signal.move(batch, inputs, moves)
        if self.recall is not None:
            self.recall.after_compaction(batch, moves.follow(scores, batch.num_keep))

    def _num_question(self, batch: CompactionBatch) -> int:
        return batch.policy.num_question(self.config.kv_window)

    def _is_question(self, batch: CompactionBatch, positions: Tensor, num_prompt: Tensor | int) -> Tensor:
        """Return which positions the method keeps because they are the question, bool."""
        return (positions >= num_prompt - self._num_question(batch)) & (positions < num_prompt)

    def _select_tokens(self, batch: CompactionBatch, scores: Tensor) -> Moves:
        """Let every layer and head keep its own tokens."""
        if self._num_question(batch):
            # The operator pins both ends only.
            ends = [[[[request.num_prompt]]] for _, request in batch.jobs]
            question = self._is_question(batch, batch.positions, to_device(ends, torch.int32, scores.device))
            scores = scores.masked_fill(question, torch.finfo(scores.dtype).max)
        most = max(min(o.num_keep, o.num_resident - o.num_keep) for o, _ in batch.jobs)
        numbers = (batch.num_resident, batch.num_keep, batch.pin_below, batch.pin_from)
        return Moves(*self._select_keep(scores, batch.positions, *numbers, most))

    def _select_sentences(self, batch: CompactionBatch, scores: Tensor) -> Moves:
        """Let whole sentences leave, the same for all layers and heads, whose scores are equal."""
        sentences = self._signals.sentences
        assert sentences is not None
        layers, heads = scores.shape[1:3]
        rows = []
        for r, (order, request) in enumerate(batch.jobs):
            length = order.num_resident
            # All layers and heads hold the same tokens, so the first one's positions are those of all.
            by_position = batch.positions[r, 0, 0, :length].argsort()
            positions = batch.positions[r, 0, 0, :length][by_position]
            pinned = (positions < batch.pin_below[r]) | (positions >= batch.pin_from[r])
            if self._num_question(batch):
                pinned |= self._is_question(batch, positions, request.num_prompt)
            number = sentences.numbers(batch, r, positions)
            kept_sorted = select_sentences(scores[r, 0, 0, :length][by_position], pinned, number, order.num_keep)
            kept = torch.zeros_like(kept_sorted).scatter(0, by_position, kept_sorted)
            rows.append(ops.move_list(kept, order.num_keep))
        most = max(source.shape[0] for source, _, _ in rows)
        source, hole = (
            torch.stack(
                [torch.nn.functional.pad(torch.where(row[2], row[i], 0), (0, most - row[2].shape[0])) for row in rows]
            )
            for i in (0, 1)
        )
        count = torch.stack([valid.sum() for _, _, valid in rows])
        shape = (len(rows), layers, heads)
        return Moves(
            source.int()[:, None, None].expand(*shape, -1).contiguous(),
            hole.int()[:, None, None].expand(*shape, -1).contiguous(),
            count.int()[:, None, None].expand(shape).contiguous(),
        )
