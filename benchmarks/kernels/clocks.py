"""How calls are timed, captured and weighed on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

Work = Callable[[], object]

CPU = torch.device("cpu")


class Clock(Protocol):
    """Times calls on one kind of device.

    Attributes:
        kind: "cpu" or "cuda".
        device: where tensors are made.
    """

    kind: str
    device: torch.device

    def interleaved(self, works: Mapping[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
        """Time every call, one round after the other, so that a disturbance affects all of them.

        Args:
            works: what to time; each is called before, so that compilation and first allocations do not count.
            repeats: rounds at least.
            seconds: rounds go on until this much time has passed.

        Returns:
            Seconds of each call on the device, by name.
        """
        ...

    def enqueue(self, work: Work, repeats: int = 5) -> float | None:
        """Return the median seconds in which the host enqueues a call on an idle device; None where it runs the call
        itself."""
        ...

    def captured(self, work: Work) -> Work:
        """Return a call that repeats the work of another one as its engine would: from a graph where there is one."""
        ...

    def peak_memory(self, work: Work) -> int | None:
        """Return the bytes by which memory grows at most during a call; None where the system does not report it."""
        ...

    def free_memory(self) -> int:
        """Return the bytes that tensors may take."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies the device, for JSON."""
        ...


class CpuClock:
    """A CPU: calls are over when they return."""

    kind = "cpu"
    device = CPU

    def interleaved(self, works: Mapping[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
        """See `Clock`."""
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

    def enqueue(self, work: Work, repeats: int = 5) -> float | None:
        """See `Clock`."""
        return None

    def captured(self, work: Work) -> Work:
        """See `Clock`."""
        return work

    def peak_memory(self, work: Work) -> int | None:
        """See `Clock`: growth of the process."""
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

    def free_memory(self) -> int:
        """See `Clock`."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def describe(self) -> dict[str, Any]:
        """See `Clock`."""
        return {"type": self.kind}


LONGEST_DELAY = 5e-3
"""Seconds for which a GPU is kept busy at most while the host enqueues a call."""

CYCLES_PER_SECOND = 2e9
"""Clock of a fast GPU; with a slower one the delay only becomes longer."""


class CudaClock:
    """A GPU, timed by events. Before every call its L2 cache is overwritten, as a model's other work would do, and it
    is kept busy for as long as the host needs to enqueue the call, so that no gap between two launches counts.

    Args:
        device: of the tensors.
        cuda: the interface; tests pass another one.
    """

    kind = "cuda"

    def __init__(self, device: torch.device = torch.device("cuda"), cuda: Any = torch.cuda) -> None:  # noqa: B008
        self.device, self._cuda = device, cuda
        self._properties = cuda.get_device_properties(device)
        self._flush = torch.empty(4 * self._properties.L2_cache_size, dtype=torch.int8, device=device)

    def interleaved(self, works: Mapping[str, Work], repeats: int, seconds: float) -> dict[str, list[float]]:
        """See `Clock`."""
        delays = {}
        for name, work in works.items():
            work()
            delays[name] = min(2 * self.enqueue(work, 1), LONGEST_DELAY)
        times: dict[str, list[float]] = {name: [] for name in works}
        start = time.perf_counter()
        while len(next(iter(times.values()))) < repeats or time.perf_counter() - start < seconds:
            events = {name: self._timed(work, delays[name]) for name, work in works.items()}
            self._cuda.synchronize()
            for name, (begin, end) in events.items():
                times[name].append(begin.elapsed_time(end) / 1e3)
        return times

    def _timed(self, work: Work, delay: float) -> tuple[Any, Any]:
        """Enqueue a call between two events."""
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        self._cuda._sleep(int(delay * CYCLES_PER_SECOND))
        begin.record()
        work()
        end.record()
        return begin, end

    def enqueue(self, work: Work, repeats: int = 5) -> float:
        """See `Clock`."""
        times = []
        for _ in range(repeats):
            self._cuda.synchronize()
            before = time.perf_counter()
            work()
            times.append(time.perf_counter() - before)
        self._cuda.synchronize()
        return median(times)

    def captured(self, work: Work) -> Work:
        """See `Clock`: the replay of a graph of the call."""
        side = self._cuda.Stream()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):
            work()  # compiles
        self._cuda.current_stream().wait_stream(side)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            work()
        replay: Work = graph.replay
        return replay

    def peak_memory(self, work: Work) -> int | None:
        """See `Clock`: of PyTorch's allocator, which serves the operators' libraries too."""
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        work()
        self._cuda.synchronize()
        return int(self._cuda.max_memory_allocated()) - int(before)

    def free_memory(self) -> int:
        """See `Clock`."""
        self._cuda.empty_cache()
        free, _ = self._cuda.mem_get_info()
        return int(free)

    def describe(self) -> dict[str, Any]:
        """See `Clock`."""
        found = self._properties
        return {
            "type": self.kind,
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda,
        }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
