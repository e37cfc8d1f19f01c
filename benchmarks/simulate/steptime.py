"""Seconds of a step as a function of its contents: fitted to measured steps, or computed from a GPU's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from skipkv_vllm.capacity import ModelShape


class StepLoad(NamedTuple):
    """The work of a step: requests, tokens computed, tokens held by all, compactions (may be a mean)."""

    requests: float
    tokens: float
    resident: float
    compactions: float


@dataclass(frozen=True)
class StepTime:
    """Seconds: `fixed + max(weights, per_token * tokens) + per_request * requests + per_resident * resident +
    per_compaction * compactions`. The weights are read while the tokens are computed, hence the maximum."""

    fixed: float
    weights: float
    per_token: float
    per_request: float
    per_resident: float
    per_compaction: float

    def __call__(self, load: StepLoad) -> float:
        matmul = max(self.weights, self.per_token * load.tokens)
        rest = self.per_request * load.requests + self.per_resident * load.resident
        return self.fixed + matmul + rest + self.per_compaction * load.compactions

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def fit(steps: np.ndarray) -> StepTime:
    """Fit by least squares without negative costs.

    Args:
        steps: `[steps, 6]`, see `benchmarks.load.engine.STEP_COLUMNS`.
    """
    seconds, requests, tokens, _, resident, compactions = steps.T
    columns = np.stack([np.ones_like(seconds), requests, tokens, resident, compactions], axis=1)
    scale = columns.max(axis=0)
    used = [i for i in range(columns.shape[1]) if scale[i] > 0]
    while True:
        found, *_ = np.linalg.lstsq(columns[:, used] / scale[used], seconds, rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    costs = np.zeros(columns.shape[1])
    costs[used] = found / scale[used]
    fixed, per_request, per_token, per_resident, per_compaction = costs.tolist()
    return StepTime(fixed, 0.0, per_token, per_request, per_resident, per_compaction)


@dataclass(frozen=True)
class GPU:
    """Published figures of one GPU: GiB, bytes/s of memory, dense bf16 FLOP/s, bytes/s to its peers (one way)."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 80, 3.35e12, 989e12, 450e9),
        GPU("H200", 141, 4.8e12, 989e12, 450e9),
        GPU("A100", 80, 2.04e12, 312e12, 300e9),
        GPU("L40S", 48, 0.864e12, 362e12, 32e9),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """The shares of a GPU's figures that an engine reaches. The defaults are assumptions; `calibrated` replaces them.

    Attributes:
        weights: share of the bandwidth while weights are read.
        attention: share of the bandwidth while KV is read.
        flops: share of the FLOP/s in matrix products.
        host: seconds of a step that no GPU work hides.
        per_request: seconds of a step for each request, sampling included.
        latency: seconds of an all-reduce beside its bytes.
        compaction: time of a compaction as a multiple of what its reads, moves and products take at those shares.
    """

    weights: float = 0.8
    attention: float = 0.7
    flops: float = 0.6
    host: float = 1e-3
    per_request: float = 2e-6
    latency: float = 1e-5
    compaction: float = 2.0


@dataclass(frozen=True)
class Eviction:
    """Sizes of a compaction: tokens held before it, and tokens it frees."""

    bound: int
    buffer: int


def on_gpu(
    gpu: GPU, shape: ModelShape, parameters: float, ranks: int, efficiency: Efficiency, eviction: Eviction | None = None
) -> StepTime:
    """Step time of one replica.

    Args:
        gpu: of each rank.
        shape: of one rank.
        parameters: of the whole model.
        ranks: tensor-parallel ranks.
        efficiency: what is reached of the GPU's figures.
        eviction: None for full KV.
    """
    mine = parameters / ranks
    reduced = 2 * shape.num_layers * shape.hidden_size * shape.element_size * 2 * (ranks - 1) / ranks
    compaction = 0.0
    if eviction is not None:
        heads = shape.num_layers * shape.num_kv_heads
        # Every pair of keys once, the worst case of the redundancy; the keys read once; the survivors moved.
        products = heads * eviction.bound**2 * shape.head_size / (gpu.flops * efficiency.flops)
        moved = (eviction.bound / 2 + 2 * eviction.buffer) * shape.kv_bytes / (gpu.bandwidth * efficiency.attention)
        compaction = efficiency.compaction * (products + moved)
    return StepTime(
        fixed=efficiency.host + (2 * shape.num_layers * efficiency.latency if ranks > 1 else 0.0),
        weights=mine * shape.element_size / (gpu.bandwidth * efficiency.weights),
        per_token=2 * mine / (gpu.flops * efficiency.flops) + reduced / gpu.link,
        per_request=efficiency.per_request,
        per_resident=shape.kv_bytes / (gpu.bandwidth * efficiency.attention),
        per_compaction=compaction,
    )


def calibrated(
    measured: StepTime, gpu: GPU, shape: ModelShape, parameters: float, eviction: Eviction, assumed: Efficiency
) -> Efficiency:
    """Compute the efficiency of a measured engine of one rank; terms that the fit left at 0 stay as assumed.

    Args:
        measured: fitted to its steps. Its fixed part holds the reading of the weights.
        gpu: that it ran on.
        shape: its model.
        parameters: of its model.
        eviction: sizes of its compactions.
        assumed: the host's share is taken from here, because a fit cannot tell it from the weights.
    """
    found = assumed
    reading = measured.fixed - assumed.host
    if reading > 0:
        found = replace(found, weights=min(1.0, parameters * shape.element_size / (gpu.bandwidth * reading)))
    if measured.per_resident > 0:
        found = replace(found, attention=min(1.0, shape.kv_bytes / (gpu.bandwidth * measured.per_resident)))
    if measured.per_token > 0:
        found = replace(found, flops=min(1.0, 2 * parameters / (gpu.flops * measured.per_token)))
    if measured.per_request > 0:
        found = replace(found, per_request=measured.per_request)
    ideal = on_gpu(gpu, shape, parameters, 1, replace(found, compaction=1.0), eviction).per_compaction
    if measured.per_compaction > 0:
        found = replace(found, compaction=measured.per_compaction / ideal)
    return found


def read_step_time(values: Mapping[str, Any]) -> StepTime:
    """Read the result of `StepTime.as_dict`."""
    return StepTime(**{name: float(values[name]) for name in StepTime.__dataclass_fields__})
