"""The operators in C++ and CUDA, which `setup.py` builds from `csrc/` into libraries beside this file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .schema import SCHEMAS

LIBRARIES = {"cpu": "_skipkv_cpu.so", "cuda": "_skipkv_cuda.so"}
"""Device type -> library; it registers `torch.ops.skipkv_<device type>`."""

OVERRIDES = {"cpu": "SKIPKV_NATIVE_CPU", "cuda": "SKIPKV_NATIVE_CUDA"}
"""Device type -> environment variable with the path of another library, as `make sanitize` has one."""

REBUILD = "pip install --no-build-isolation -e ."
REMEDIES = {
    "cpu": f"run `{REBUILD}` in a checkout, with g++ installed (Debian/Ubuntu: apt-get install g++)",
    "cuda": f"run `SKIPKV_BUILD_CUDA=1 {REBUILD}` in a checkout, with a CUDA toolkit (nvcc) installed",
}


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Load a device's library; return why its operators cannot run, and the remedy, or None if they can."""
    name = LIBRARIES.get(device_type)
    if name is None:
        return f"has no operators for {device_type}"
    path = Path(os.environ.get(OVERRIDES[device_type]) or Path(__file__).with_name(name))
    if not path.exists():
        return f"{path.name} was not built; {REMEDIES[device_type]}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded ({error.__cause__ or error}); {REMEDIES[device_type]}"
    library = getattr(torch.ops, f"skipkv_{device_type}")
    if stale := [op for op, schema in SCHEMAS.items() if not _has(library, op, schema)]:
        return f"{path.name} was built from other sources ({', '.join(stale)} differ); {REMEDIES[device_type]}"
    return None


def _has(library: Any, op: str, schema: str) -> bool:
    if not hasattr(library, op):
        return False
    wanted = torch._C.parse_schema(f"{library.name}::{op}{schema}")
    return str(getattr(library, op).default._schema) == str(wanted)


def operator(op: str, device_type: str) -> Callable[..., Any]:
    """Return the operator of a device's library, which must be available; calls reach it without detours."""
    return getattr(getattr(torch.ops, f"skipkv_{device_type}"), op).default


def __getattr__(op: str) -> Callable[..., Any]:
    """Return an operator as a function of tensors on any device; see `torch_backend`."""
    if op in SCHEMAS:
        return _on_any_device(op)
    raise AttributeError(f"module {__name__!r} has no attribute {op!r}")


@functools.cache
def _on_any_device(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        return operator(op, tensor.device.type)(*args)

    return call


def limit_isa(level: int) -> int:
    """Limit the CPU operators to an instruction set: 0 any processor, 1 AVX2, 2 AVX-512; for tests.

    Returns:
        The level in use, which the processor may limit further.
    """
    return torch.ops.skipkv_cpu.limit_isa(level)


def score_scratch(length: int, dim: int, window: int, group: int) -> int:
    """Return the bytes of scratch memory that a CPU thread of `score_tokens` takes for a request of this length."""
    return torch.ops.skipkv_cpu.score_scratch(length, dim, window, group)
