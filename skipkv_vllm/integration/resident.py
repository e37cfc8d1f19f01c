"""Resident lengths for the attention of the layers that are compacted; all other layers get logical ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..worker.batch import Evicted

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.utils import AttentionGroup


def replaced(blocks: Sequence[list[int]], group: int, by: list[int]) -> tuple[list[int], ...]:
    """Return the block ids of a request by group, with those of one group replaced."""
    return tuple(by if i == group else own for i, own in enumerate(blocks))


class ResidentLengths:
    """Replaces the sequence lengths that attention gets in one group of the KV cache.

    Attention reads a persistent buffer, also while graphs are captured, so that FULL graphs read it on replay.

    Args:
        max_num_reqs: most requests of a batch.
        device: where the model runs.

    Attributes:
        evicted: tokens that the requests of the coming batch no longer hold; None if they hold all.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.evicted: Evicted | None = None
        self._seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)

    def attach(self, groups: Iterable[AttentionGroup]) -> None:
        """Hook the attention groups of one group of the KV cache, whose metadata is built by each of them."""
        for group in groups:
            if "build_metadata" in vars(group):
                continue  # hooked before
            for name in ("build_metadata", "build_metadata_for_cudagraph_capture"):
                setattr(group, name, self._around(getattr(group, name)))

    def _around(self, build: Any) -> Any:
        def build_resident(common: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
            return build(self._resident(common), *args, **kwargs)

        return build_resident

    def _resident(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        rows = common.seq_lens.shape[0]
        seq_lens = self._seq_lens[:rows]
        seq_lens.copy_(common.seq_lens)
        # The cache of what follows from the lengths may hold logical numbers.
        changed: dict[str, Any] = {"seq_lens": seq_lens, "_num_computed_tokens_cache": None}
        if self.evicted is not None:
            n, upper_bound = len(self.evicted.host), common.seq_lens_cpu_upper_bound
            seq_lens[:n].sub_(self.evicted.device)
            if upper_bound is not None:
                # Some backends plan blocks from this bound as if it were exact.
                upper_bound = upper_bound.clone()
                upper_bound[:n].sub_(torch.from_numpy(self.evicted.host))
                changed |= {"seq_lens_cpu_upper_bound": upper_bound, "max_seq_len": int(upper_bound.max())}
        return dataclasses.replace(common, **changed)
