"""Seconds of a step as a function of its contents: fitted to measured steps, or computed from a GPU's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from skipkv_vllm.capacity import ModelShape

from .eviction import Eviction, EvictionCost, assumed_cost
from .gpus import GPU, Efficiency


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


def on_gpu(
    gpu: GPU,
    shape: ModelShape,
    parameters: float,
    ranks: int,
    efficiency: Efficiency,
    eviction: EvictionCost = EvictionCost(),  # noqa: B008
) -> StepTime:
    """Compute the step time of one replica.

    Args:
        gpu: of each rank.
        shape: of one rank.
        parameters: of the whole model.
        ranks: tensor-parallel ranks.
        efficiency: what is reached of the GPU's figures.
        eviction: what a policy adds.
    """
    mine = parameters / ranks
    reduced = 2 * shape.num_layers * shape.hidden_size * shape.element_size * 2 * (ranks - 1) / ranks
    all_reduces = 2 * shape.num_layers * efficiency.latency if ranks > 1 else 0.0
    return StepTime(
        fixed=efficiency.host + all_reduces + eviction.fixed,
        weights=mine * shape.element_size / (gpu.bandwidth * efficiency.weights),
        per_token=2 * mine / (gpu.flops * efficiency.flops) + reduced / gpu.link,
        per_request=efficiency.per_request + eviction.per_request,
        per_resident=shape.kv_bytes / (gpu.bandwidth * efficiency.attention),
        per_compaction=eviction.per_compaction,
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
    # What the operators of every step launch is in the fixed part.
    found = replace(assumed, launch=0.0, compaction=1.0)
    reading = measured.fixed - assumed.host
    if reading > 0:
        found = replace(found, weights=min(1.0, parameters * shape.element_size / (gpu.bandwidth * reading)))
    if measured.per_resident > 0:
        found = replace(found, attention=min(1.0, shape.kv_bytes / (gpu.bandwidth * measured.per_resident)))
    if measured.per_token > 0:
        found = replace(found, flops=min(1.0, 2 * parameters / (gpu.flops * measured.per_token)))
    if measured.per_request > 0:
        recording = assumed_cost(gpu, shape, eviction, found).per_request
        found = replace(found, per_request=max(0.0, measured.per_request - recording))
    if measured.per_compaction > 0:
        ideal = assumed_cost(gpu, shape, eviction, found).per_compaction
        found = replace(found, compaction=measured.per_compaction / ideal)
    return found


def read_step_time(values: Mapping[str, Any]) -> StepTime:
    """Read the result of `StepTime.as_dict`."""
    return StepTime(**{name: float(values[name]) for name in StepTime.__dataclass_fields__})
