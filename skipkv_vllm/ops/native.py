"""The C++ and CUDA operators of `csrc/`, which `setup.py` builds into libraries beside this file."""

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

OVERRIDE = "SKIPKV_NATIVE_CPU"
"""Environment variable with the path of another library for the CPU: an instrumented one, for `make sanitize`."""

REBUILD = "pip install --no-build-isolation -e ."
REMEDIES = {
    "cpu": f"run `{REBUILD}` in a checkout, with g++ installed (Debian/Ubuntu: apt-get install g++)",
    "cuda": f"run `SKIPKV_BUILD_CUDA=1 {REBUILD}` in a checkout, with a CUDA toolkit (nvcc) installed",
}


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why the operators cannot run on a device, and the remedy; None where they can. Loads the library."""
    name = LIBRARIES.get(device_type)
    if name is None:
        return f"has no operators for {device_type}"
    path = Path(__file__).with_name(name)
    if device_type == "cpu" and (other := os.environ.get(OVERRIDE)):
        path = Path(other)
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
    """The operator of a device's library itself, which must be available; nothing stands between it and the caller."""
    return getattr(getattr(torch.ops, f"skipkv_{device_type}"), op).default


def _on_any_device(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        return operator(op, tensor.device.type)(*args)

    call.__doc__ = f"See `batched.{op}`."
    return call


score_tokens = _on_any_device("score_tokens")
measure_attention = _on_any_device("measure_attention")
key_similarity = _on_any_device("key_similarity")
select_keep = _on_any_device("select_keep")
compact_pages = _on_any_device("compact_pages")
track_sentences = _on_any_device("track_sentences")
sentence_similarity = _on_any_device("sentence_similarity")
held_positions = _on_any_device("held_positions")
token_penalties = _on_any_device("token_penalties")
record_queries = _on_any_device("record_queries")
track_thoughts = _on_any_device("track_thoughts")
steer_add = _on_any_device("steer_add")


def limit_isa(level: int) -> int:
    """Let the CPU operators use no instructions beyond a level: 0 any processor, 1 AVX2, 2 AVX-512; for tests.

    Returns:
        The level in use, which the processor may limit further.
    """
    return torch.ops.skipkv_cpu.limit_isa(level)


def score_scratch(length: int, dim: int, window: int, group: int) -> int:
    """Bytes of scratch memory that a CPU thread of `score_tokens` takes for a request of this length."""
    return torch.ops.skipkv_cpu.score_scratch(length, dim, window, group)
