"""What operators are timed on: a clock, the backends that run there, and what the machine reaches at its best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import torch

from skipkv_vllm import KVPolicyError
from skipkv_vllm.ops.dispatch import BACKENDS, ORDER

from .clocks import Clock, CpuClock, CudaClock, Work

OURS = "ours"
"""Name of the fastest backend's figures."""


class Limits:
    """A matmul and a copy that reach the device's limits; on CPUs with the current number of threads.

    Args:
        device: of the tensors.
        size: of the matrices.
        copied: bytes that the copy reads, and writes; more than any cache holds.
        dtype: of the matrices.

    Attributes:
        works: what to time beside the operators.
    """

    def __init__(self, device: torch.device, size: int, copied: int, dtype: torch.dtype) -> None:
        self._size, self._copied = size, copied
        # Zeros would take less power, and so run faster, than numbers.
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        source = torch.ones(copied // 4, device=device)
        target = torch.empty_like(source)
        self.works: dict[str, Work] = {"matmul": lambda: torch.mm(a, a, out=out), "copy": lambda: target.copy_(source)}

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Limits:
        """Choose sizes that fill the device; matrices have the dtype of the cache on GPUs, and float32 on CPUs."""
        if device.type == "cpu":
            return cls(device, 1536, 192 * 2**20, torch.float32)
        return cls(device, 8192, 2**30, dtype)

    def reached(self, times: Mapping[str, list[float]]) -> Reached:
        """Return what the machine did at its best in these rounds."""
        return Reached(2 * self._size**3 / min(times["matmul"]), 2 * self._copied / min(times["copy"]))


class Reached(NamedTuple):
    """Measured rates.

    Attributes:
        flops: multiplications and additions a second of a matmul.
        bandwidth: bytes a second that a copy reads and writes.
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, moved: float) -> float:
        """Return the seconds without which no program does these operations and reads and writes these bytes."""
        return max(flops / self.flops, moved / self.bandwidth)

    def as_row(self) -> dict[str, float]:
        """Return both for a row of results."""
        return {"matmul_gflops": self.flops / 1e9, "copy_gb_per_s": self.bandwidth / 1e9}


@dataclass(frozen=True)
class Machine:
    """The device of a run.

    Attributes:
        clock: times calls.
        backends: name -> module with the operators, the fastest first; PyTorch's is not among them.
        missed: why backends are missing.
        limits: what it can reach.
    """

    clock: Clock
    backends: Mapping[str, Any]
    missed: tuple[str, ...]
    limits: Limits

    @classmethod
    def of(cls, device: str, dtype: torch.dtype) -> Machine:
        """Look for the backends of a device, "cpu" or "cuda".

        Raises:
            KVPolicyError: there is no such device, or no backend but PyTorch.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise KVPolicyError("--device cuda: PyTorch sees no GPU; use --device cpu, or install its CUDA build")
        found, missed = {}, []
        for name in ORDER[device]:
            module = import_module(BACKENDS[name])
            if name == "torch":
                continue
            if why := module.unavailable(device):
                missed.append(f"{name}: {why}")
            else:
                found[name] = module
        if not found:
            raise KVPolicyError(f"--device {device}: {'; '.join(missed)}")
        clock = CpuClock() if device == "cpu" else CudaClock()
        return cls(clock, found, tuple(missed), Limits.of(clock.device, dtype))

    def arms(self, operator: str, *arguments: Any, others: bool = True) -> dict[str, Work]:
        """Return calls of an operator by every backend: the fastest as "ours", and the others if asked for."""
        first, *rest = self.backends
        arms: dict[str, Work] = {OURS: partial(self.function(operator, first), *arguments)}
        return arms | {name: partial(self.function(operator, name), *arguments) for name in (rest if others else ())}

    def function(self, operator: str, backend: str | None = None) -> Callable[..., Any]:
        """Return an operator as the runtime calls it, without detours; by default of the fastest backend."""
        module = self.backends[backend or next(iter(self.backends))]
        direct = getattr(module, "operator", None)
        found: Callable[..., Any] = (
            getattr(module, operator) if direct is None else direct(operator, self.clock.device.type)
        )
        return found

    def time(self, works: Mapping[str, Work], repeats: int, seconds: float) -> Timed:
        """Time calls in turns with the machine's limits."""
        times = self.clock.interleaved({**works, **self.limits.works}, repeats, seconds)
        rounds = len(times["matmul"])
        reached = self.limits.reached(times)
        return Timed({name: median(times[name]) for name in works}, reached, rounds)

    def describe(self) -> dict[str, Any]:
        """Return the device and the backends, for JSON."""
        names = list(self.backends)
        versions = {"triton": import_module("triton").__version__} if "triton" in names else {}
        return self.clock.describe() | versions | {"ours": names[0], "backends": names, "missed": list(self.missed)}


class Timed(NamedTuple):
    """Median seconds by name, the machine's rates in the same rounds, and the number of rounds."""

    seconds: dict[str, float]
    reached: Reached
    rounds: int

    def ms(self, *names: str) -> dict[str, float]:
        """Return milliseconds for a row, of some names or of all."""
        return {f"{name}_ms": self.seconds[name] * 1e3 for name in names or self.seconds}
