"""Wrap a function of vLLM, once per process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` with `around(owner.name)`; a second call does nothing.

    Args:
        owner: a class or module.
        name: of its function.
        around: takes the original and returns the function that calls it.
    """
    original = getattr(owner, name)
    if not hasattr(original, "_skipkv"):
        wrapped = functools.wraps(original)(around(original))
        wrapped._skipkv = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)
