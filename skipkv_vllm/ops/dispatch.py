"""The choice of a backend for each operator and device, and the registration of the operators with PyTorch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from ..core.errors import KVPolicyError
from .paging import Layout
from .schema import FAKES, NAMESPACE, NATIVE, SCHEMAS

logger = logging.getLogger("vllm.skipkv")

OVERRIDE = "SKIPKV_OPS"
"""Environment variable that forces one of `BACKENDS`, for tests and bug reports."""

BACKENDS = {
    "native": "skipkv_vllm.ops.native",
    "triton": "skipkv_vllm.ops.triton_backend",
    "torch": "skipkv_vllm.ops.torch_backend",
}
"""Backend -> module. A module has a function for each operator that it offers, with the signature of `schema.SCHEMAS`.
It may define `unavailable(device_type) -> str | None`, why it cannot run there, and the remedy;
`lacks(op, device_type, layout) -> str | None`, why it cannot read such pages there; and `operator(op, device_type)`, a
faster way to call the same function on one device."""

ORDER = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}
"""Device type -> backends, the fastest first. Triton's interpreter is a test tool and not a backend for CPUs."""


class Choice(NamedTuple):
    """The implementation chosen for an operator.

    Attributes:
        backend: key of `BACKENDS`.
        function: the implementation.
        missed: faster backends that are unavailable, and why.
    """

    backend: str
    function: Callable[..., Any]
    missed: tuple[str, ...]


def _unavailable(backend: str, op: str, device_type: str, layout: Layout) -> str | None:
    module = import_module(BACKENDS[backend])
    why: str | None = getattr(module, "unavailable", lambda _: None)(device_type)
    if why is None and not hasattr(module, op):
        why = f"has no {op}"
    if why is None and hasattr(module, "lacks") and "int layout" in SCHEMAS[op]:
        why = module.lacks(op, device_type, layout)
    return why


def _candidates(op: str, device_type: str, wanted: str | None) -> tuple[str, ...]:
    """Return the backends that may have an operator, the fastest first; those in C++ and CUDA lack a few."""
    is_native = op in NATIVE
    if wanted is not None and (is_native or wanted != "native"):
        return (wanted,)
    return tuple(each for each in ORDER.get(device_type, ("torch",)) if is_native or each != "native")


@functools.cache
def choose(op: str, device_type: str, layout: Layout = Layout.ROWS) -> Choice:
    """Return the fastest available backend of an operator.

    Args:
        op: the operator.
        device_type: of the tensors that it gets.
        layout: of the pages that it reads, if it reads any.

    Raises:
        KVPolicyError: the backend named by `SKIPKV_OPS` is unknown or cannot run.
    """
    wanted = os.environ.get(OVERRIDE)
    if wanted is not None and wanted not in BACKENDS:
        raise KVPolicyError(f"{OVERRIDE}={wanted!r} is unknown; choose one of: {', '.join(BACKENDS)}, or unset it")
    missed: list[str] = []
    for backend in _candidates(op, device_type, wanted):
        why = _unavailable(backend, op, device_type, layout)
        if why is None:
            module = import_module(BACKENDS[backend])
            direct = getattr(module, "operator", None)
            run = getattr(module, op) if direct is None else direct(op, device_type)
            return Choice(backend, run, tuple(missed))
        missed.append(f"{backend}: {why}")
    raise KVPolicyError(f"{OVERRIDE}={wanted!r} cannot run {op} on {device_type}: {'; '.join(missed)}; unset it")


def function(op: str, device: torch.device, layout: Layout = Layout.ROWS) -> Callable[..., Any]:
    """Return an operator's implementation on a device, for pages of a layout if it reads any.

    Calls at every step use it to avoid PyTorch's dispatcher.
    """
    return choose(op, device.type, layout).function


def report(device_type: str, layout: Layout = Layout.ROWS) -> dict[str, Choice]:
    """Return the implementation of each operator on a device, for `skipkv doctor`."""
    return {op: choose(op, device_type, layout) for op in SCHEMAS}


def warn_if_slow(device_type: str, layout: Layout = Layout.ROWS, operators: Iterable[str] = NATIVE) -> None:
    """Log a warning if some operators fall back to PyTorch although a faster backend exists."""
    found = {op: choose(op, device_type, layout) for op in operators}
    slow = {op: choice for op, choice in found.items() if choice.backend == "torch" and choice.missed}
    if slow:
        reasons = sorted({why for choice in slow.values() for why in choice.missed})
        logger.warning("SkipKV: %s run in PyTorch, which is slow. %s", ", ".join(slow), "; ".join(reasons))


def _registered(op: str, device_type: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return choose(op, device_type).function(*args)

    def call_by_layout(*args: Any) -> Any:
        return choose(op, device_type, Layout(args[place])).function(*args)

    names = SCHEMAS[op].split(" -> ")[0].split(", ")
    if "int layout" not in names:
        return call
    place = names.index("int layout")
    return call_by_layout


_library = torch.library.Library(NAMESPACE, "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema)
    for _device in ORDER:
        _library.impl(_op, _registered(_op, _device), _device.upper())
    torch.library.register_fake(f"{NAMESPACE}::{_op}", FAKES[_op], lib=_library)
