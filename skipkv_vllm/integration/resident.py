"""Resident lengths for the attention of the layers that are compacted; all other layers get logical ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

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
        self._views: dict[int, tuple[Tensor, np.ndarray | None]] = {}

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
        evicted, resident = self.evicted, copy.copy(common)
        seq_lens, on_host = self._of_batch(common.seq_lens.shape[0])
        resident.seq_lens = seq_lens
        # What was cached of the lengths may be logical.
        resident._num_computed_tokens_cache = None
        if evicted is None:
            seq_lens.copy_(common.seq_lens)
            return resident
        n = len(evicted.host)
        if on_host is None:
            seq_lens.copy_(common.seq_lens)
            seq_lens[:n].sub_(evicted.device)
        else:
            on_host[:] = common.seq_lens.numpy()
            on_host[:n] -= evicted.host
        _shorten_bound(resident, evicted.host)
        return resident

    def copied(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Return a copy of metadata with resident lengths in a tensor of its own."""
        evicted, resident = self.evicted, copy.copy(common)
        resident.seq_lens = common.seq_lens.clone()
        resident._num_computed_tokens_cache = None
        if evicted is not None:
            resident.seq_lens[: len(evicted.host)].sub_(evicted.device)
            _shorten_bound(resident, evicted.host)
        return resident

    def _of_batch(self, num_rows: int) -> tuple[Tensor, np.ndarray | None]:
        """Return the lengths of a batch, and the same as an array if the device is the CPU.

        They are kept, because for a few numbers NumPy takes a fraction of PyTorch's time, even of that of a slice.
        """
        found = self._views.get(num_rows)
        if found is None:
            view = self._seq_lens[:num_rows]
            found = self._views[num_rows] = (view, view.numpy() if view.device.type == "cpu" else None)
        return found


def _shorten_bound(resident: CommonAttentionMetadata, evicted: np.ndarray) -> None:
    """Take evicted tokens off the upper bound of lengths, from which some backends plan blocks as if it were exact."""
    if resident.seq_lens_cpu_upper_bound is not None:
        bound = resident.seq_lens_cpu_upper_bound.numpy().copy()
        bound[: len(evicted)] -= evicted
        resident.seq_lens_cpu_upper_bound, resident.max_seq_len = torch.from_numpy(bound), int(bound.max())
