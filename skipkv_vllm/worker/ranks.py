"""A worker's place among those that share a model, and what they exchange at a compaction or swap.

With granularity "head" every rank decides for its own layers and heads. Only four things concern all ranks: the score
of a sentence, the sparsity of a segment's attention and the evidence that an evicted token is asked for, which are
means over layers and heads, and sentences in a pipeline, which only the last stage can compare. Ranks exchange them
unreduced and add them up in rank order. So every rank holds the same bits, whatever algorithm the network library
chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """A worker's place.

    Attributes:
        num_pairs: number of (layer, kv head) pairs of all ranks together.
        most_pairs: pairs of the rank that has most; 0 if they exchange nothing.
        layers: index in the model of each of this rank's layers whose KV is compacted; empty for 0, 1, 2, ...
        first_head: index in the model of this rank's first kv head.
        num_stages: stages of the pipeline.
        group: the ranks of this engine, or None if they exchange nothing.
        source: global rank of the first worker of the last stage, which knows the sentences.
    """

    num_pairs: int = 0
    most_pairs: int = 0
    layers: tuple[int, ...] = ()
    first_head: int = 0
    num_stages: int = 1
    group: dist.ProcessGroup | None = None
    source: int = 0

    def layer_numbers(self, num_layers: int) -> Sequence[int]:
        """Return the index in the model of each of this rank's layers, of which there are `num_layers`."""
        return self.layers or range(num_layers)

    def mean(self, scores: Tensor) -> Tensor:
        """Average scores `[R, layers, H, N]` over the layers and heads of all ranks: `[R, N]`, the same on each."""
        if self.group is None:
            return scores.mean(dim=(1, 2))
        own = scores.sum(dim=(1, 2))
        sums = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(sums, own, group=self.group)
        return torch.stack(sums).sum(dim=0) / self.num_pairs

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Fill the tensor with that of the last stage, in place, and return it; shape and type agree on all ranks."""
        dist.broadcast(tensor, self.source, group=self.group)
        return tensor


ALONE = Ranks()
