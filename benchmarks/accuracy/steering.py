"""The steering evaluation: its arms, and the random vectors that the bundled one is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results.steering import RANDOM
from skipkv_vllm.evaluation.figures import FULL, OURS
from skipkv_vllm.steering import SteeringVector

from .grid import Steer

VECTOR = "bundled"


def random_vectors(vector: SteeringVector, count: int, folder: Path) -> dict[str, str]:
    """Write vectors of the same norm for the same layer with random directions; returns name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for seed in range(count):
        drawn = torch.randn(vector.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = (drawn * vector.norm / drawn.norm()).float()
        file = folder / f"{RANDOM}{seed}.safetensors"
        vector.with_values(values, f"random, seed {seed}").save(file)
        files[f"{RANDOM}{seed}"] = str(file)
    return files


def ways_to_steer(
    alpha0: Sequence[float], gamma: float, random: Iterable[str], random_alpha0: Sequence[float]
) -> list[str]:
    """List `Settings.steering` of the evaluation: each kind at each strength."""
    ways = [f"{FULL}/{Steer(VECTOR, alpha, 0.0)}" for alpha in alpha0]
    ways += [f"{policy}/{Steer(VECTOR, alpha, gamma)}" for policy in (FULL, OURS) for alpha in alpha0]
    return ways + [f"{FULL}/{Steer(name, alpha, gamma)}" for name in random for alpha in random_alpha0]


def describe_vector(file: str) -> dict[str, Any]:
    """Describe a vector for the record."""
    vector = SteeringVector.load(file)
    known = {key: value for key, value in vars(vector).items() if key != "values"}
    return {"file": file, "norm": vector.norm, "hidden_size": vector.hidden_size} | known
