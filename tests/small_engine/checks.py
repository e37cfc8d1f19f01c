"""What is verified of the small engine: counts, pages, survivors and the output of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.ops.paging import LayerPages
from skipkv_vllm.worker.batch import Evicted
from skipkv_vllm.worker.runtime import EvictionRuntime
from tests.small_engine.definition import Definition, Held, Verdict
from tests.small_engine.log import Log
from tests.small_engine.model import Activations
from tests.small_engine.scheduler import Running
from tests.small_engine.shape import Shape

if TYPE_CHECKING:
    from tests.small_engine.engine import Report


class Checks:
    """Follows every request and compares.

    Args:
        config: of the server.
        shape: sizes.
        runtime: under test.
        log: all tokens.
        text: token ids by row.
        layers: pages of each layer.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        shape: Shape,
        runtime: EvictionRuntime,
        log: Log,
        text: Tensor,
        layers: Sequence[LayerPages],
    ) -> None:
        self._shape, self._runtime, self._log, self._layers = shape, runtime, log, layers
        self._definition = Definition(config, log, text)
        self._held: dict[str, Held] = {}
        self._errors: list[Tensor] = []
        """largest error of each step, on the device"""
        self._agreements: list[tuple[int, int]] = []
        """of each compaction the survivors that agree, and all"""
        self._largest_gap = 0.0

    def start(self, request: Running) -> None:
        """Follow a request that starts, or starts over."""
        shape, resolved = self._shape, request.record.resolved
        limits, schedule = resolved.limits, request.record.planner.schedule
        assert limits is not None
        mask = torch.zeros(shape.layers, shape.kv_heads, shape.max_length, dtype=torch.bool, device=shape.device)
        mask[..., : request.num_computed_tokens - request.count] = True
        first = 0 if schedule is None else schedule.first
        self._held[request.request_id] = Held(
            request.row, resolved.policy, resolved.num_prompt, limits.protected, first, mask
        )

    def evicted(self, batch: Sequence[Running], evicted: Evicted | None) -> None:
        """The worker has evicted as many tokens of each request as the scheduler counts."""
        counted = [request.record.num_evicted for request in batch]
        assert counted == ([0] * len(batch) if evicted is None else evicted.host.tolist())

    # ---- after compactions

    def after_compactions(self, orders: Sequence[Compaction]) -> None:
        """Compare pages and survivors of requests that were just compacted."""
        for order in orders:
            self._runtime.check_integrity(order)
            request, held = self._held[order.request_id], self._runtime.held(order).long()
            self._check_pages(request, order, held)
            verdict = self._definition.verdict(request, order)
            survivors = torch.zeros_like(request.mask).scatter_(-1, held, True)
            assert not (survivors & ~request.mask).any(), "an evicted token came back"
            self._compare(verdict, survivors)
            request.mask = survivors

    def _check_pages(self, request: Held, order: Compaction, held: Tensor) -> None:
        """The first slots of the blocks have the bits of the tokens that the runtime says they have."""
        blocks = torch.tensor(order.target_blocks, device=held.device)[:, None] * self._shape.ratio
        table = (blocks + torch.arange(self._shape.ratio, device=held.device)).flatten()
        for layer, pages in enumerate(self._layers):
            index = held[layer][..., None].expand(-1, -1, self._shape.head_size)
            for view, log in ((pages.keys, self._log.keys), (pages.values, self._log.values)):
                found = view.read_pages(table, order.num_keep)
                wanted = log[request.row, layer].transpose(0, 1).gather(1, index)
                assert torch.equal(found, wanted), f"layer {layer} of {order.request_id} holds other tokens"

    def _compare(self, verdict: Verdict, survivors: Tensor) -> None:
        kept, found = (mask & ~verdict.pinned for mask in (verdict.kept, survivors))
        self._agreements.append((int((kept & found).sum()), int(kept.sum())))
        wrong = kept != found
        if wrong.any():
            of_free = verdict.scores.masked_fill(~torch.isfinite(verdict.scores) | verdict.pinned, torch.nan)
            limit = of_free.masked_fill(~kept, torch.inf).nan_to_num(torch.inf).amin(dim=-1, keepdim=True)
            centred = of_free - of_free.nanmean(dim=-1, keepdim=True)
            spread = centred.square().nanmean(dim=-1, keepdim=True).sqrt()
            gap = ((of_free - limit).abs() / spread)[wrong].amax()
            self._largest_gap = max(self._largest_gap, float(gap))

    # ---- after the forward pass

    def after_forward(
        self, batch: Sequence[Running], counts: np.ndarray, starts: np.ndarray, computed: Activations
    ) -> None:
        """Compare attention with dense attention over what each request should hold; nothing waits for the device."""
        first = 0
        position = torch.arange(self._shape.max_length, device=self._shape.device)
        for request, count, start in zip(batch, counts.tolist(), starts.tolist(), strict=True):
            held = self._held[request.request_id]
            held.mask[..., start : start + count] = True
            part = slice(first, first + count)
            query = computed.queries[:, part].float().unflatten(2, (self._shape.kv_heads, -1))
            keys, values = (x[held.row].float().movedim(2, 1) for x in (self._log.keys, self._log.values))
            logits = torch.einsum("lnhgd,lhtd->lhgnt", query, keys) / self._shape.head_size**0.5
            causal = position <= start + torch.arange(count, device=position.device)[:, None]
            sees = held.mask[:, :, None, None] & causal
            weights = logits.masked_fill(~sees, -torch.inf).softmax(dim=-1)
            wanted = torch.einsum("lhgnt,lhtd->lnhgd", weights, values).flatten(2, 3)
            error = (computed.outputs[:, part].float() - wanted).abs()
            # 16-bit numbers above 1 are rounded in proportion to their size.
            self._errors.append((error / wanted.abs().clamp(min=1)).amax())
            first += count

    def conclude(self, report: Report) -> None:
        """Fill in the figures of a report."""
        errors = torch.stack(self._errors)
        assert errors.isfinite().all(), "attention is not finite"
        report.output_error = float(errors.amax())
        if self._agreements:
            agreeing, every = (sum(column) for column in zip(*self._agreements, strict=True))
            report.agreement = agreeing / max(every, 1)
            report.least_agreement = min(agreed / max(of, 1) for agreed, of in self._agreements)
        report.largest_gap = self._largest_gap
