"""Run reasoning models in vLLM with a fixed, small KV cache."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.errors import KVPolicyError

if TYPE_CHECKING:
    from .integration.compat import engine_arguments
    from .integration.llm import LLM

try:
    __version__ = version("skipkv-vllm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

__all__ = [
    "LLM",
    "KVPolicyError",
    "__version__",
    "bundled_gates",
    "bundled_model",
    "bundled_vector",
    "engine_arguments",
]


def bundled_model() -> str:
    """Return the folder of the small reasoning model in the package (a Qwen2 checkpoint)."""
    return str(Path(__file__).parent / "models" / "tiny-reasoner")


def bundled_vector() -> str:
    """Return the path of the bundled model's steering vector, for `kv_steering_vectors`."""
    # Outside the folder: vLLM loads every .safetensors file inside as weights.
    return f"{bundled_model()}-steering.safetensors"


def bundled_gates() -> str:
    """Return the path of the bundled model's learned gates, for the `gates` of policy `trimkv`."""
    return f"{bundled_model()}-gates.safetensors"


def __getattr__(name: str) -> Any:
    # Importing vLLM takes seconds, so it is imported only when needed.
    if name == "LLM":
        from .integration.llm import LLM

        return LLM
    if name == "engine_arguments":
        from .integration.compat import engine_arguments

        return engine_arguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
