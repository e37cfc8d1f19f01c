# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""How kernels are declared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(*aligned: str) -> Callable[[Any], Any]:
    """Declare a kernel that is compiled once for each set of its constants, whatever numbers it is launched with.

    Triton would compile it again for every integer that is 1 or a multiple of 16, and for every address that is not a
    multiple of 16. Lengths, rows and pages are now the one and now the other, and a request waits for a compilation.

    Args:
        aligned: pointers whose addresses are always multiples of 16, so that vectors may be read at once.

    Returns:
        A decorator of the function.
    """

    def declare(function: Any) -> Any:
        parameters = inspect.signature(function).parameters.values()
        assert {*aligned} <= {each.name for each in parameters}
        varying = [p.name for p in parameters if p.name not in aligned and "constexpr" not in str(p.annotation)]
        return triton.jit(function, do_not_specialize=varying)

    return declare
