"""A stand-in for `torch.cuda` on a machine without a GPU: every call is checked against the real signature."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


class Event:
    """Takes the time of the host when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event without timing cannot be read"
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return max(end.at - self.at, 1e-9) * 1e3


class Stream:
    """Does nothing beside others."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class CUDAGraph:
    """Counts its replays; what was captured is not known."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeCuda:
    """Answers what `CudaClock` asks, and records the order of its calls.

    Attributes:
        said: names of the functions that were called.
        graphs: what was captured, in order.
        peak: bytes that a call takes at most.
    """

    def __init__(self, free: int = 2**36) -> None:
        self.said: list[str] = []
        self.graphs: list[CUDAGraph] = []
        self.peak = 1000
        self._functions = {
            "get_device_properties": lambda device: SimpleNamespace(
                name="Fake H100", major=9, minor=0, multi_processor_count=1, total_memory=free, L2_cache_size=256
            ),
            "synchronize": lambda: None,
            "_sleep": lambda cycles: None,
            "Event": Event,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": self._stream,
            "CUDAGraph": CUDAGraph,
            "graph": self._graph,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 10,
            "max_memory_allocated": lambda: 10 + self.peak,
            "empty_cache": lambda: None,
            "mem_get_info": lambda: (free, free),
        }

    def __getattr__(self, name: str) -> Any:
        function, real = self._functions[name], getattr(torch.cuda, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(real).bind(*args, **kwargs)
            self.said.append(name)
            return function(*args, **kwargs)

        return call

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, Stream)
        yield

    @contextmanager
    def _graph(self, graph: CUDAGraph) -> Iterator[None]:
        assert isinstance(graph, CUDAGraph)
        self.graphs.append(graph)
        yield
