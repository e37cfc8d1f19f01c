"""Waiting and graphs, on a GPU and on a CPU that stands in for it.

A GPU that makes the host wait costs time; a CPU never waits. So on a CPU every operator is forbidden that would read a
number from a GPU. A CUDA graph repeats launches on the same memory; on a CPU the operators are recorded and repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")

ON_CPU = os.environ.get("SKIPKV_GPU_TESTS") == "cpu"
"""Whether the tests for GPUs run on the CPU, to test the tests themselves."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
"""Devices of tests that a CPU can run too."""

READING = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"),
        *("unique_consecutive", "allclose", "bincount", "histc", "repeat_interleave.Tensor"),
    )
)
"""Operators that read a number from the device to know what to return."""


class ForbidReading(TorchDispatchMode):
    """Raises where a GPU would make the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator unless it is forbidden."""
        if {func._schema.name, func.name()} & READING:
            raise RuntimeError(f"{func.name()} would make the host wait for a GPU")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise on operations of PyTorch that make the host wait for the device."""
    if device.type == "cpu":
        with ForbidReading():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Graph(Generic[T]):
    """Work that was captured once and can be repeated on the same memory.

    Attributes:
        output: what the work returned; every replay writes its tensors anew.
    """

    output: T

    def replay(self) -> None:
        """Repeat the work."""
        raise NotImplementedError


class CudaGraph(Graph[T]):
    """The work as a CUDA graph; it must have run once before, so that kernels are compiled."""

    def __init__(self, work: Callable[[], T]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


class RecordedGraph(Graph[T]):
    """The work as a list of the operators that it called, with their tensors.

    As with a CUDA graph, Python code of the work does not run again, and an operator that would read a number from the
    device, or makes a tensor of numbers of the host, is refused.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        recorder = _Recorder()
        with recorder:
            self.output = work()
        self._calls = recorder.calls

    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            found = func(*args, **kwargs)
            if made:
                every = _tensors(found)
                for place, tensor in made:
                    tensor.copy_(every[place])


class _Recorder(ForbidReading):
    """Writes down operators; `calls` has each with its arguments and the tensors that it allocated, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::lift_fresh":
            raise RuntimeError("a tensor is made of numbers of the host, which a graph would repeat for ever")
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        made = [(i, tensor) for i, tensor in enumerate(_tensors(out)) if _memory(tensor) not in given]
        # Another view of the same memory is made once and for all.
        if made or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, made))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, whatever part of it the tensor shows."""
    return tensor.untyped_storage().data_ptr()


def capture(work: Callable[[], T], device: torch.device) -> Graph[T]:
    """Capture work on persistent tensors, to be repeated."""
    return CudaGraph(work) if device.type == "cuda" else RecordedGraph(work)
