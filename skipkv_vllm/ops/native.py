"""The operators in C++ and CUDA, which `setup.py` builds from `csrc/` into libraries beside this file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import KVPolicyError
from . import images
from .paging import Layout
from .schema import NATIVE, SCHEMAS

LIBRARIES = {"cpu": "_skipkv_cpu.so", "cuda": "_skipkv_cuda.so"}
"""Device type -> library; it registers `torch.ops.skipkv_<device type>`."""

OVERRIDES = {"cpu": "SKIPKV_NATIVE_CPU", "cuda": "SKIPKV_NATIVE_CUDA"}
"""Device type -> environment variable with the path of another library, as `make sanitize` has one."""

READ_LATENTS = ("compact_pages",)
"""CUDA operators that take pages of latents (MLA); the others hold whole keys in registers, and these are too large."""

REBUILD = "pip install --no-build-isolation -e ."
REMEDIES = {
    "cpu": f"run `{REBUILD}` in a checkout, with g++ installed (Debian/Ubuntu: apt-get install g++)",
    "cuda": f"run `SKIPKV_BUILD_CUDA=1 {REBUILD}` in a checkout, with a CUDA toolkit (nvcc) installed",
}


def unavailable(device_type: str) -> str | None:
    """Load a device's library; return why its operators cannot run, and the remedy, or None if they can.

    It does not start CUDA. Before CUDA has started, one fitting GPU of the machine is enough; then the current one must
    fit.
    """
    why = _cannot_load(device_type)
    if why is not None or device_type != "cuda":
        return why
    path = path_of(device_type)
    return images.misfit(path.name, built_for(path), images.capabilities(), f"SKIPKV_BUILD_CUDA=1 {REBUILD}")


def lacks(op: str, device_type: str, layout: Layout) -> str | None:
    """Return why an operator cannot read pages of a layout on a device; None if it can."""
    if device_type == "cuda" and layout is Layout.LATENT and op not in READ_LATENTS:
        return "its kernels for GPUs do not read latents (MLA)"
    return None


def path_of(device_type: str) -> Path:
    """Return where a device's library must lie."""
    return Path(os.environ.get(OVERRIDES[device_type]) or Path(__file__).with_name(LIBRARIES[device_type]))


@functools.cache
def built_for(path: Path) -> tuple[str, ...]:
    """Return the images of a CUDA library that has been loaded, as nvcc names them."""
    return images.images_of(str(path)) or ()


@functools.cache
def _cannot_load(device_type: str) -> str | None:
    if device_type not in LIBRARIES:
        return f"has no operators for {device_type}"
    path = path_of(device_type)
    if not path.exists():
        return f"{path.name} was not built; {REMEDIES[device_type]}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded ({error.__cause__ or error}); {REMEDIES[device_type]}"
    library = getattr(torch.ops, f"skipkv_{device_type}")
    stale = [op for op, schema in SCHEMAS.items() if op in NATIVE and not _has(library, op, schema)]
    if device_type == "cuda" and images.images_of(str(path)) is None:
        stale.append(images.SYMBOL)
    if stale:
        return f"{path.name} was built from other sources ({', '.join(stale)} differ); {REMEDIES[device_type]}"
    return None


def _has(library: Any, op: str, schema: str) -> bool:
    if not hasattr(library, op):
        return False
    wanted = torch._C.parse_schema(f"{library.name}::{op}{schema}")
    return str(getattr(library, op).default._schema) == str(wanted)


def operator(op: str, device_type: str) -> Callable[..., Any]:
    """Return the operator of a device's library; calls reach it without detours.

    Raises:
        KVPolicyError: the library is unavailable.
    """
    return getattr(_loaded(device_type), op).default


def _loaded(device_type: str) -> Any:
    """Return the namespace of a device's library, which this loads if nobody has."""
    if why := unavailable(device_type):
        raise KVPolicyError(f"the native operators cannot run on {device_type}: {why}")
    return getattr(torch.ops, f"skipkv_{device_type}")


def __getattr__(op: str) -> Callable[..., Any]:
    """Return an operator as a function of tensors on any device; see `torch_backend`."""
    if op in NATIVE:
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
    return _loaded("cpu").limit_isa(level)


def score_scratch(length: int, dim: int, window: int, group: int) -> int:
    """Return the bytes of scratch memory that a CPU thread of `score_tokens` takes for a request of this length."""
    return _loaded("cpu").score_scratch(length, dim, window, group)
