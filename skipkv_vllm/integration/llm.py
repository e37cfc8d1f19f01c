"""Offline use: `LLM(model, kv_policy="skipkv", kv_budget=1024, **any_vllm_argument)`."""

from __future__ import annotations

from collections.abc import Mapping
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


def sampling_params(options: Mapping[str, Any], **arguments: Any) -> SamplingParams:
    """Return vLLM's sampling parameters for a request of which only the final output is read.

    Args:
        options: per-request options of this package; see `RequestOptions`.
        arguments: of `SamplingParams`.
    """
    return SamplingParams(extra_args=dict(options) or None, output_kind=RequestOutputKind.FINAL_ONLY, **arguments)
