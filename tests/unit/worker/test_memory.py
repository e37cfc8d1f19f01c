"""The temporary memory of compactions and accumulations stays within the formula that the engine reserves it by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipkv_vllm.policies import policy_names
from skipkv_vllm.worker.cache import SCRATCH_BYTES, SLOT_BYTES, TEMPORARY_BYTES, temporary_bytes
from skipkv_vllm.worker.warm_up import warm_up
from tests.simulation import HIDDEN, KV_HEADS, Simulation


class PeakMemory(TorchDispatchMode):
    """Sums up the tensors that operators return and that are alive at once.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = func(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found


@pytest.mark.parametrize("policy", [name for name in policy_names() if name not in ("full", "laq", "finch")])
def test_a_compaction_takes_no_more_than_the_engine_reserves(policy: str) -> None:
    layers = 2 if policy == "trimkv" else 6  # the gates are those of two layers
    sim = Simulation(policy, protect=False, num_layers=layers, num_blocks=160, buffer=200, max_length=300)
    compact, measured = sim.runtime._compactor.run, []

    def watched(jobs: Any) -> None:
        with PeakMemory() as memory:
            compact(jobs)
        measured.append((memory.peak, sum(job.order.num_resident for job in jobs)))

    sim.runtime._compactor.run = watched
    warm_up(sim.runtime, hidden_size=HIDDEN, dtype=torch.float32, max_length=300)

    peak, slots = measured[-1]
    assert slots == 2 * (64 + 200)
    print(f"{peak / (slots * layers * KV_HEADS):.1f} bytes per slot, layer and head")
    assert peak / (slots * layers * KV_HEADS) <= SLOT_BYTES
    if policy == "skipkv":  # the default method takes most; scratch memory inside of operators is not seen here
        assert peak / (slots * layers * KV_HEADS) > SLOT_BYTES / 2


def test_one_long_request_may_take_more_than_a_launch_of_several() -> None:
    assert temporary_bytes(36, 8, 2176) == TEMPORARY_BYTES + SCRATCH_BYTES
    assert temporary_bytes(36, 8, 20_000) == SLOT_BYTES * 36 * 8 * 20_000 + SCRATCH_BYTES
