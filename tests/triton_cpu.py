"""Lets Model Runner V2 run without a GPU, for tests only.

vLLM's V2 runner needs Triton and Triton needs a GPU. Its interpreter runs the same kernels in NumPy, if
vLLM can be made to believe that there is a driver.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _AlwaysActive:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _AlwaysActive
    compiler = None


def enable() -> None:
    """Select Model Runner V2 through Triton's interpreter here and in worker processes; call before importing vLLM."""
    # Triton reads the variable when a kernel is decorated, so existing kernels stay compiled.
    assert "vllm" not in sys.modules, "too late: vLLM has already decided about Triton"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    here = Path(__file__).parent
    paths = [str(here / "site"), str(here.parent), os.getenv("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    prepare()


def prepare() -> None:
    """Make Triton's interpreter run vLLM's kernels in this process, which compiles none."""
    register_backend()
    make_faster()
    take_masks_of_integers()


def register_backend() -> None:
    """Give Triton a driver."""
    from triton.backends import backends

    backends.setdefault("cpu", _Backend)


def make_faster(check_overflow: bool = False) -> None:
    """Take half of the interpreter's work away, in a process that compiles no kernel.

    At every launch it replaces all functions of `triton.language` by its own, and afterwards puts the old ones back.
    Here its own stay. Of every sum and product it also verifies that no integer overflows, if `check_overflow`.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace_functions, replaced = interpreter._patch_lang, set()

    def replace_once(fn: Any) -> Any:
        scope = interpreter._LangPatchScope()
        if id(fn.__globals__) not in replaced:
            replaced.add(id(fn.__globals__))
            replace_functions(fn)
        return scope  # that has nothing to put back

    interpreter._patch_lang = replace_once
    numpy_type = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_type)
    interpreter._get_np_dtype = lambda one: of_scalar(one) if type(one) is tl.dtype else numpy_type(one)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=check_overflow)


def take_masks_of_integers() -> None:
    """Let the interpreter take masks as compiled kernels do, where a scalar of one bit may be part of a mask.

    The kernels of vLLM's search for n-grams have such masks, which NumPy would take for indices.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _with_boolean_mask(getattr(InterpreterBuilder, name), place))


def _with_boolean_mask(access: Callable[..., Any], place: int) -> Callable[..., Any]:
    def access_masked(self: Any, *args: Any) -> Any:
        args[place].data = args[place].data.astype(bool, copy=False)
        return access(self, *args)

    return access_masked


def use_triton_attention() -> None:
    """Use vLLM's Triton attention and the page layout of GPUs instead of the CPU's; call after `enable`."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.TRITON_ATTN.value)
    # It reads the GPU's compute capability.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
