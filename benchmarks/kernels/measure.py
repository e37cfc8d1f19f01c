"""Times, memory and the limits of the machine."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

Work = Callable[[], object]


def interleaved(works: Mapping[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Time every call, one round after the other, so that a disturbance affects all of them.

    Args:
        works: what to time; each is called once before.
        repeats: rounds at least.
        seconds: rounds go on until this much time has passed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    start = time.perf_counter()
    while len(next(iter(times.values()))) < repeats or time.perf_counter() - start < seconds:
        for name, work in works.items():
            before = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - before)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median time of each."""
    return {name: median(each) for name, each in times.items()}


def limits() -> dict[str, Work]:
    """Functions that reach this machine's limits with the current number of threads: a float32 matmul, and a copy of
    memory that no cache holds."""
    a = torch.randn(MATMUL, MATMUL)
    out = torch.empty_like(a)
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return {"matmul": lambda: torch.mm(a, a, out=out), "copy": lambda: target.copy_(source)}


MATMUL = 1536
COPY_BYTES = 192 * 2**20


def gflops(seconds: float) -> float:
    """Of the matmul of `limits`."""
    return 2 * MATMUL**3 / seconds / 1e9


def gigabytes(seconds: float) -> float:
    """Read and written each second by the copy of `limits`, in GB."""
    return 2 * COPY_BYTES / seconds / 1e9


def peak_memory(work: Work) -> int | None:
    """Bytes by which the process grows at most while it works; None where the system does not report it."""
    gc.collect()
    try:
        # Memory that the allocator kept would hide what is used of it.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
