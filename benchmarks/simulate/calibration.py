"""Measured figures instead of assumed ones: of an engine, or of the operators."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.kernels.steps import BY_EMBEDDINGS, BY_WORDS, CORRECTIONS, RECORDED
from benchmarks.results.sections.simulation import ASSUMED
from skipkv_vllm import KVPolicyError
from skipkv_vllm.capacity import ModelShape
from skipkv_vllm.config import KVPolicyConfig

from .eviction import OPERATIONS, Eviction, EvictionCost, assumed_cost
from .gpus import GPU, Efficiency
from .steptime import calibrated, read_step_time

ENGINES, KERNELS = "benchmarks.throughput", "benchmarks.kernels"

Row = Mapping[str, Any]


class Costs:
    """What eviction costs on a kind of GPU, as assumed.

    Args:
        gpu: the GPU.
        efficiency: the shares of its figures.

    Attributes:
        efficiency: see above.
        origin: where the figures come from, for readers.
    """

    origin = ASSUMED

    def __init__(self, gpu: GPU, efficiency: Efficiency) -> None:
        self._gpu, self.efficiency = gpu, efficiency

    def of(self, shape: ModelShape, eviction: Eviction, requests: int) -> EvictionCost:
        """Compute the cost on one rank.

        Args:
            shape: of the rank.
            eviction: what is done.
            requests: that run at once.

        Raises:
            KVPolicyError: it does not follow from what was measured.
        """
        return assumed_cost(self._gpu, shape, eviction, self.efficiency)


def read_costs(path: Path, gpu: GPU, parameters: float) -> Costs:
    """Read a file of `benchmarks.throughput` or of `benchmarks.kernels`.

    Args:
        path: the file.
        gpu: that is simulated; the file must be of one.
        parameters: of the model of a file of `benchmarks.throughput`.

    Raises:
        KVPolicyError: another file, or one of another device.
    """
    try:
        figures = json.loads(path.read_text())
        run = figures["run"]
        kind, device = run["command"][2], _gpus(run)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise KVPolicyError(
            f"--calibration {path}: no figures of a benchmark ({type(error).__name__}: {error})"
        ) from None
    if kind not in (ENGINES, KERNELS):
        raise KVPolicyError(f"--calibration {path} was written by {kind}; give a file of {ENGINES} or {KERNELS}")
    if not any(gpu.name in each for each in device):
        where = ", ".join(device) or f"a CPU ({run['machine']['cpu']})"
        remedy = "--device cuda" if kind == KERNELS else "--one-by-one"
        raise KVPolicyError(
            f"--calibration {path} was measured on {where}, which says nothing about an {gpu.name}; run "
            f"`python -m {kind} {remedy}` on one"
        )
    origin = f"measured at commit {run['commit']} on {run['date']}"
    return _Engine(gpu, figures, parameters, origin) if kind == ENGINES else _Operators(gpu, path, figures, origin)


def _gpus(run: Row) -> list[str]:
    """Name the GPUs on which a run was timed."""
    if "device" in run:
        return [run["device"]["name"]] if run["device"]["type"] == "cuda" else []
    return list(run["machine"]["gpus"])


class _Engine(Costs):
    """Costs that follow from the steps of a measured engine."""

    def __init__(self, gpu: GPU, figures: Row, parameters: float, origin: str) -> None:
        found, settings = figures["calibration"], figures["run"]["settings"]
        fields = {
            "kv_policy": "policy",
            "kv_budget": "budget",
            "kv_buffer": "buffer",
            "kv_policy_config": "policy_config",
        }
        config = KVPolicyConfig.parse({name: settings[key] for name, key in fields.items() if key in settings})
        measured, shape = read_step_time(found[settings["policy"]]), ModelShape(**found["shape"])
        # The engine wrote what it wrote; whether its keys were similar is not known.
        eviction = Eviction.of(config, found["bound"], "distinct")
        super().__init__(gpu, calibrated(measured, gpu, shape, parameters, eviction, Efficiency()))
        self.origin = origin


class Measured(NamedTuple):
    """The shape that operators were timed at."""

    layers: int
    heads: int
    query_heads: int
    dim: int


class _Operators(Costs):
    """Costs that follow from the times of the operators; the engine around them stays as assumed."""

    def __init__(self, gpu: GPU, path: Path, figures: Row, origin: str) -> None:
        super().__init__(gpu, Efficiency())
        self._path, self._figures = path, figures
        settings = figures["run"]["settings"]
        self._measured = Measured(*(settings[name] for name in Measured._fields))
        self.origin = f"assumed for the engine; times of the operators {origin}"

    def of(self, shape: ModelShape, eviction: Eviction, requests: int) -> EvictionCost:
        """See `Costs`."""
        if shape.head_size != self._measured.dim:
            raise self._lacks(f"a head size of {shape.head_size}", f"--dim {shape.head_size}")
        if eviction.rule == "keys":
            raise KVPolicyError(
                f"--calibration {self._path} has no times of {eviction.method}; leave --calibration out"
            )
        # So many requests reach their bound in a step.
        at_once = requests / eviction.buffer
        heads = shape.num_layers * shape.num_kv_heads
        moving = ("ours_ms", "select_ms", "positions_ms")
        seconds = sum(self._unit("compaction", key, eviction.bound, at_once) for key in moving) * heads
        seconds += self._scoring(shape, eviction, requests)
        # The ranking by what was measured is PyTorch's, and was not timed.
        ranking = 0.0 if eviction.rule == "redundancy" else OPERATIONS * self.efficiency.eager
        fixed, per_request = self._step(shape, eviction)
        return EvictionCost(seconds * eviction.bound + ranking, fixed, per_request)

    def _scoring(self, shape: ModelShape, eviction: Eviction, requests: int) -> float:
        """Seconds of the scores of a compaction, for each token held."""
        heads, bound = shape.num_layers * shape.num_kv_heads, eviction.bound
        if eviction.rule == "redundancy":
            at_once = requests / eviction.buffer
            return self._unit("scoring", "ours_ms", bound, at_once, keys=eviction.keys) * heads
        queries = self._rows("measuring")[0]["queries"]
        # The work grows with the query heads, so those of a kv head must be reckoned with.
        group = shape.num_heads / shape.num_kv_heads / (self._measured.query_heads / self._measured.heads)
        reading = self._unit("measuring", f"{eviction.rule}_ours_ms", bound, requests / queries) * group
        reading += self._unit("compaction", "positions_ms", bound, requests / queries)
        similarity = 0.0
        if eviction.rule == "error":
            similarity = self._unit("measuring", "similarity_ours_ms", bound, requests / eviction.buffer)
        return heads * (eviction.buffer / queries * reading + similarity)

    def _unit(self, table: str, key: str, length: int, at_once: float, **wanted: Any) -> float:
        """Seconds for each token, layer and kv head, at a length between those that were measured."""
        rows = [row for row in self._rows(table) if all(row[name] == value for name, value in wanted.items())]
        nearest = min({row["requests"] for row in rows}, key=lambda number: abs(np.log(number / max(at_once, 1e-9))))
        rows = sorted((row for row in rows if row["requests"] == nearest), key=lambda row: row["length"])
        lengths = [row["length"] for row in rows]
        if length > lengths[-1]:
            raise self._lacks(f"lengths above {lengths[-1]}; a request holds up to {length}", f"--lengths {length}")
        units = nearest * self._measured.layers * self._measured.heads
        costs = [row[key] / 1e3 / (units * row["length"]) for row in rows]
        # Short requests cost no more for each token than the shortest one that was measured.
        return float(np.interp(length, lengths, costs))

    def _step(self, shape: ModelShape, eviction: Eviction) -> tuple[float, float]:
        """Seconds of the operators of every step: in all, and for each request."""
        measured = self._measured
        layers = shape.num_layers / measured.layers
        width = layers * shape.num_heads / measured.query_heads
        parts = [(CORRECTIONS, 1.0, 1.0)]
        if eviction.records:
            parts.append((RECORDED, layers, width))
        if eviction.tracks:
            parts.append((BY_EMBEDDINGS if eviction.tracks == "embeddings" else BY_WORDS, 1.0, 1.0))
        fixed = per_request = 0.0
        for name, of_fixed, of_requests in parts:
            if not (rows := [row for row in self._rows("steps") if row["operator"] == name]):
                raise self._lacks(name, "")
            all_, each = _line([row["tokens"] for row in rows], [row["ours_ms"] / 1e3 for row in rows])
            fixed += of_fixed * all_
            per_request += of_requests * each
        return fixed, per_request

    def _rows(self, table: str) -> list[Row]:
        rows: Iterable[Row] = self._figures.get(table, ())
        if not (found := list(rows)):
            raise self._lacks(f"the table {table!r}", "")
        return found

    def _lacks(self, what: str, words: str) -> KVPolicyError:
        command = f"python -m {KERNELS} --device cuda {words}".strip()
        return KVPolicyError(f"--calibration {self._path} has no figures for {what}; measure again: {command}")


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Fit a line without negative parts: its value at 0, and its slope."""
    if len(x) < 2:
        return y[0], 0.0
    slope, start = np.polyfit(x, y, 1)
    if slope < 0:
        return float(np.mean(y)), 0.0
    return (float(start), float(slope)) if start >= 0 else (0.0, float(np.dot(x, y) / np.dot(x, x)))
