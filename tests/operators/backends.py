"""Backends of the parity tests, and parametrisation with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.ops import native
from skipkv_vllm.ops.paging import Layout
from tests import triton_cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels are interpreted in this process; it tests nothing else then."""
if INTERPRETED:
    triton_cpu.make_faster(check_overflow=True)


@dataclass(frozen=True)
class Backend:
    """A backend on a device.

    Attributes:
        isa: highest instruction set of the CPU operators.
        whole: whether all cases run; the interpreter runs a few.
        layouts: how pages may be packed that it reads.
        tolerance: of scores in 16-bit caches, relative to the largest of a row.
    """

    name: str
    device: str = "cpu"
    isa: int = 2
    whole: bool = True
    layouts: Sequence[Layout] = tuple(Layout)
    tolerance: float = 1e-5

    @property
    def module(self) -> ModuleType:
        return import_module(f"skipkv_vllm.ops.{'triton_backend' if self.name == 'triton' else 'native'}")

    def __str__(self) -> str:
        return f"{self.name}-{self.device}" + (f"-isa{self.isa}" if self.device == "cpu" and self.isa < 2 else "")


def _backends() -> list[Backend]:
    if INTERPRETED:
        return [Backend("triton", whole=False, layouts=(Layout.ROWS, Layout.LATENT), tolerance=2e-2)]
    found = [Backend("native"), Backend("native", isa=1), Backend("native", isa=0)]
    if torch.cuda.is_available():
        found.append(Backend("native", "cuda", layouts=(Layout.ROWS,), tolerance=2e-2))
        found.append(Backend("triton", "cuda", layouts=(Layout.ROWS, Layout.LATENT), tolerance=2e-2))
    return found


BACKENDS = _backends()


@pytest.fixture(autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip unavailable backends; use one thread and the test's instruction set."""
    params = getattr(request.node, "callspec", None)
    backend = params.params.get("backend") if params else None
    if backend is not None and (why := backend.module.unavailable(backend.device)):
        pytest.skip(f"{backend}: {why}")
    on_cpu = backend is not None and (backend.name, backend.device) == ("native", "cpu")
    if on_cpu and native.limit_isa(backend.isa) < backend.isa:
        pytest.skip(f"{backend}: this processor lacks the instructions")
    # Small inputs gain nothing from threads, and lose if other processes use the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if native.unavailable("cpu") is None:
        native.limit_isa(2)


def cases(named: dict[str, Any], few: Iterable[str] = ()) -> Any:
    """Parametrise with backends and cases; `few` names the cases for slow backends."""
    chosen = set(few)
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(backend, case, id=f"{backend}-{name}".replace(" ", "-"))
            for backend in BACKENDS
            for name, case in named.items()
            if (backend.whole or name in chosen) and _layout(case) in backend.layouts
        ],
    )


def _layout(case: Any) -> Layout:
    pages = getattr(case, "pages", None)
    return pages.layout if pages else Layout.ROWS


each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def on(device: str, arguments: Iterable[Any]) -> list[Any]:
    """Move the arguments of an operator to a device; addresses follow the caches."""
    if device == "cpu":
        return list(arguments)
    moved = [
        [t.to(device) for t in a] if isinstance(a, list) else a.to(device) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    if isinstance(moved[0], list):
        moved[1] = torch.tensor([t.data_ptr() for t in moved[0]], device=device)
    return moved
