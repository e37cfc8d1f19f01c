"""Choose the adapter of a model runner."""

from __future__ import annotations

from typing import Any

from . import compat
from .runner_v1 import EvictingRunnerV1, HookedRunnerV1
from .runner_v2 import EvictingRunnerV2, HookedRunnerV2


def adapt_runner(runner: Any, vllm_config: Any, is_v2: bool) -> None:
    """Make a freshly built model runner of vLLM an evicting one.

    Its class is replaced by a subclass, because runners come in several classes per platform.
    """
    compat.enable(vllm_config)
    adapter: type
    if is_v2:
        adapter = EvictingRunnerV2 if compat.is_public("resident lengths, runner V2") else HookedRunnerV2
    else:
        adapter = EvictingRunnerV1 if compat.is_public("resident lengths, runner V1") else HookedRunnerV1
    runner.__class__ = type(f"Evicting{type(runner).__name__}", (adapter, type(runner)), {})
