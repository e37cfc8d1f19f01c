"""Carry vLLM's Triton attention to a machine without vLLM: two of its files, and a stub for what they import."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

PACKAGE = "paged_attention"
"""Name of the carried package. It is not vLLM's, so that nothing takes the machine for one with vLLM."""

FILES = ("triton_unified_attention.py", "triton_attention_helpers.py")

IMPORTS = {
    "import vllm.envs as envs": "from .stub import envs",
    "from vllm.logger import init_logger": "from .stub import init_logger",
    "from vllm.platforms import current_platform": "from .stub import current_platform",
    "from vllm.triton_utils import tl, triton": "from .stub import tl, triton",
    "from vllm.v1.attention.ops.triton_attention_helpers import (": "from .triton_attention_helpers import (",
    "from vllm.v1.kv_cache_interface import KVQuantMode": "from .stub import KVQuantMode",
}
"""Import in vLLM -> import in the carried package."""

STUB = '''"""What vLLM's Triton attention imports from the rest of vLLM {version}; made by scripts/gpu_check."""

import logging
from enum import IntEnum
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

init_logger = logging.getLogger
envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
current_platform = SimpleNamespace(
    fp8_dtype=lambda: torch.float8_e4m3fn,
    is_device_capability_family=lambda family: torch.cuda.get_device_capability()[0] == family // 10,
)


{quantisation}
'''


def carry(folder: Path) -> str:
    """Write the package into a folder, from the installed vLLM.

    Returns:
        The version of that vLLM.

    Raises:
        RuntimeError: vLLM is not installed, or its files import something that the stub does not have.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("vLLM is not installed here; run this in the environment that scripts/bootstrap.sh makes")
    vllm, package = Path(spec.origin).parent, folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (package / name).write_text(_with_our_imports(name, (vllm / "v1/attention/ops" / name).read_text()))
    interface = (vllm / "v1/kv_cache_interface.py").read_text()
    number = version("vllm")
    (package / "stub.py").write_text(STUB.format(version=number, quantisation=_definition(interface, "KVQuantMode")))
    (package / "__init__.py").write_text("")
    return number


def _with_our_imports(name: str, source: str) -> str:
    lines = [IMPORTS.get(line, line) for line in source.splitlines()]
    # Indented imports are of kernels for other caches; nothing reaches them.
    if others := [line for line in lines if line.startswith(("import vllm", "from vllm"))]:
        raise RuntimeError(f"vLLM's {name} imports what the stub does not have: {'; '.join(others)}; extend IMPORTS")
    return "\n".join(lines) + "\n"


def _definition(source: str, name: str) -> str:
    """Return the source of a class of a module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = ast.get_source_segment(source, node)
            assert found is not None
            return found
    raise RuntimeError(f"vLLM has no {name} where it was; look for it and extend STUB")
