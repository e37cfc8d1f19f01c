"""Offline use: `LLM(model, kv_policy="skipkv", kv_budget=1024, **any_vllm_argument)`.

The commands of this package run engines through this module only.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ..config import KVPolicyConfig, parse_json_object
from .compat import engine_arguments


class LLM(vllm.LLM):
    """`vllm.LLM` that also takes the fields of `KVPolicyConfig` as keyword arguments."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in KVPolicyConfig.model_fields if name in kwargs}
        if isinstance(given.get("kv_policy_config"), str):
            given["kv_policy_config"] = parse_json_object("kv_policy_config", given["kv_policy_config"])
        super().__init__(model, **engine_arguments(given, kwargs))


@contextlib.contextmanager
def running(model: str, **arguments: Any) -> Iterator[LLM]:
    """Start an engine, and shut it down after the block.

    Args:
        model: folder or name of a checkpoint.
        arguments: of `LLM`.
    """
    llm = LLM(model, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def sampling_params(options: Mapping[str, Any], **arguments: Any) -> SamplingParams:
    """Return vLLM's sampling parameters for a request whose intermediate outputs are not needed.

    Args:
        options: per-request options of this package; see `RequestOptions`.
        arguments: of `SamplingParams`.
    """
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, extra_args=dict(options) or None, **arguments)
