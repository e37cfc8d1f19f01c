"""`thinkv`: shrink older thoughts at every change of approach (ThinKV's eviction, arXiv 2510.01290, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..core.errors import KVPolicyError
from ..core.needs import Need
from .base import About, Held, Policy, SegmentOptions, Segments, View, check_range, register_policy

FIRST_STEP, NUM_STEPS = 64, 5
"""The first step cuts a segment to 64 tokens, each further one to half of that: 32, 16, 8, 4."""

NEGLIGIBLE = 0.01
"""Share of a row's largest attention weight below which another one counts as zero."""

TRANSITION, EXECUTION, REASONING, UNFINISHED = range(4)
"""Kinds of segments, the least important first; a segment that is still being written shrinks last."""


class _Quotas(NamedTuple):
    """Quotas of the segments, `[..., S]` each.

    Attributes:
        tokens: tokens that the segment may hold.
        rank: the segment with the lowest rank shrinks first.
        steps: steps taken because the budget was exceeded.
    """

    tokens: Tensor
    rank: Tensor
    steps: Tensor


@register_policy
@dataclass(frozen=True)
class ThinKV(Policy):
    """Classify segments as reasoning, execution or transition by the sparsity of their attention, and shrink them.

    Every new transition moves all older segments one step down the ladder 64, 32, 16, 8, 4. If too many tokens remain,
    the oldest of the least important segments (transition, then execution, then reasoning) go further down, one after
    another. A segment keeps the tokens nearest to the centroids of its keys. Quantisation is not implemented.

    Attributes:
        segment: tokens of a segment.
        transition_above: sparsity above which a segment is a transition.
        execution_below: sparsity below which a segment is execution; in between it is reasoning. Both thresholds depend
            on the model; the defaults are those of the bundled one, found by `python -m benchmarks.thinkv`.
        layers: layers whose attention is measured, e.g. "1,3"; "all" for every layer.
    """

    name: ClassVar[str] = "thinkv"
    about: ClassVar[About] = About(
        "ThinKV",
        "2510.01290",
        "O(T P D) with T tokens so far and P the length of a segment; O(W G L D) every P tokens",
        "no quantisation; a compaction leaves exactly the budget, so heads are filled up with the newest tokens left "
        "out; segments shrink at compactions; a segment's kind follows from its last W queries; where even 4 tokens a "
        "segment are too many, the oldest of the least important segments leave",
        training="thresholds",
    )
    needs: ClassVar[Need] = Need.KEYS | Need.QUERIES | Need.SEGMENTS

    segment: int = 128
    transition_above: float = 0.55
    execution_below: float = 0.4905
    layers: str = "1,3"

    def __post_init__(self) -> None:
        check_range("segment", self.segment, 16, 4096)
        check_range("transition_above", self.transition_above, 0.0, 1.0)
        check_range("execution_below", self.execution_below, 0.0, self.transition_above)
        if self.layers != "all" and not all(part.strip().isdecimal() for part in self.layers.split(",")):
            raise KVPolicyError(
                f"kv_policy_config: layers={self.layers!r} is neither 'all' nor layer numbers; write e.g. '1,3'"
            )

    @property
    def segment_options(self) -> SegmentOptions:
        chosen = () if self.layers == "all" else tuple(sorted({int(part) for part in self.layers.split(",")}))
        return SegmentOptions(self.segment, NEGLIGIBLE, chosen)

    def kinds(self, sparsity: Tensor) -> Tensor:
        """Classify each segment by its sparsity, int64 `[..., S]`."""
        kind = torch.full_like(sparsity, REASONING, dtype=torch.int64)
        kind = torch.where(sparsity > self.transition_above, TRANSITION, kind)
        kind = torch.where(sparsity < self.execution_below, EXECUTION, kind)
        return torch.where(sparsity < 0, UNFINISHED, kind)

    def _quotas(self, segments: Segments) -> _Quotas:
        kind, count = self.kinds(segments.sparsity), segments.sizes.shape[-1]
        age = torch.arange(count, device=kind.device)
        turns = (kind == TRANSITION).long()
        later_turns = turns.sum(dim=-1, keepdim=True) - turns.cumsum(-1)
        # Created on the device, as copying a list from the host would wait for it.
        step = torch.arange(NUM_STEPS, device=age.device)
        ladder = F.pad(FIRST_STEP >> step, (1, 0), value=segments.longest)
        # Tokens of each segment after every number of steps; the segment that shrinks first is in the first row.
        order = (kind * count + age).argsort(dim=-1)
        level = (later_turns + segments.memory).clamp(max=NUM_STEPS).gather(-1, order)
        held = segments.sizes.gather(-1, order)[..., None].minimum(ladder)
        gain = held[..., :-1] - held[..., 1:]
        gain = torch.where(step >= level[..., None], gain, 0)
        excess = held.gather(-1, level[..., None]).sum(dim=(-2, -1)) - segments.num_free
        saved_before = (gain.flatten(-2).cumsum(-1) - gain.flatten(-2)).view(gain.shape)
        taken = (saved_before < excess[..., None, None]) & (gain > 0)
        reached = torch.where(taken, step + 1, 0).amax(dim=-1).maximum(level)
        rank = torch.empty_like(order).scatter(-1, order, age.expand_as(order))
        # The rank of a segment is its row in the sorted order.
        steps = torch.where(kind == UNFINISHED, 0, segments.memory + (reached - level).gather(-1, rank))
        return _Quotas(held.gather(-1, reached[..., None])[..., 0].gather(-1, rank), rank, steps)

    def remember(self, segments: Segments) -> Tensor:
        return self._quotas(segments).steps

    def score(self, view: View) -> Tensor:
        assert view.keys is not None
        assert view.segment is not None
        assert view.segments is not None
        quotas = self._quotas(view.segments)
        keys = view.keys.float().transpose(0, 1)
        chosen = ops.central_tokens(keys, view.segment, quotas.tokens, view.segments.longest)
        by_age = view.positions / (view.positions[:, -1:] + 1)
        return torch.where(chosen, 1.0 + quotas.rank[view.segment.clamp(0, len(quotas.rank) - 1)], by_age)

    def score_batch(self, held: Held) -> Tensor:
        assert held.segments is not None
        quotas = self._quotas(held.segments)
        first = held.column([request.num_protected for request in held.requests])
        number = (held.positions - first).div(held.segments.longest, rounding_mode="floor")
        number = number.clamp(0, quotas.rank.shape[-1] - 1).long()
        rank = quotas.rank.gather(1, number.flatten(1)).view(number.shape)
        by_age = held.positions / held.num_logical
        return torch.where(held.central_tokens(quotas.tokens), 1.0 + rank, by_age)
