"""Lets Model Runner V2 run without a GPU, for tests only.

vLLM's V2 runner needs Triton and Triton needs a GPU. Its interpreter runs the same kernels in NumPy, if
vLLM can be made to believe that there is a driver.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
    register_backend()


def register_backend() -> None:
    """Give Triton a driver."""
    from triton.backends import backends

    backends.setdefault("cpu", _Backend)


def use_triton_attention() -> None:
    """Use vLLM's Triton attention and the page layout of GPUs instead of the CPU's; call after `enable`."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.TRITON_ATTN.value)
    # It reads the GPU's compute capability.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
