"""Where a worker stands among those that share a model, and what they tell each other at a compaction.

With granularity "head" every rank decides for its own layers and heads. Only three things concern all of them: the
worth of a sentence and the sparsity of a segment's attention, which are means over all layers and heads, and sentences
in a pipeline, which only the last stage can compare. They travel as they are and are added up in the order of ranks, so
that every rank holds the same bits, whatever algorithm the network library chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """A worker's place.

    Attributes:
        num_pairs: (layer, kv head) pairs that all ranks together hold.
        first_layer: index in the model of this rank's first layer.
        first_head: index in the model of this rank's first kv head.
        num_stages: of the pipeline.
        group: the ranks of this engine, or None where they have nothing to tell each other.
        speaker: global rank of the first worker of the last stage, which knows the sentences.
    """

    num_pairs: int = 0
    first_layer: int = 0
    first_head: int = 0
    num_stages: int = 1
    group: dist.ProcessGroup | None = None
    speaker: int = 0

    def mean(self, scores: Tensor) -> Tensor:
        """Mean of scores `[R, layers, H, N]` over the layers and heads of all ranks: `[R, N]`, the same on each."""
        if self.group is None:
            return scores.mean(dim=(1, 2))
        own = scores.sum(dim=(1, 2))
        sums = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(sums, own, group=self.group)
        return torch.stack(sums).sum(dim=0) / self.num_pairs

    def from_last_stage(self, said: Tensor) -> Tensor:
        """The tensor of the last stage, in place; the others give one of the same shape and type."""
        dist.broadcast(said, self.speaker, group=self.group)
        return said


ALONE = Ranks()
