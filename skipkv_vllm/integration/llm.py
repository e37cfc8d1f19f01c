"""Offline use: `LLM(model, kv_policy="skipkv", kv_budget=1024, **any_vllm_argument)`."""

from __future__ import annotations

from typing import Any

import vllm

from ..config import KVPolicyConfig, parse_json_object
from .compat import engine_arguments


class LLM(vllm.LLM):
    """`vllm.LLM` with the KV-policy options of `KVPolicyConfig` as further keyword arguments."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in KVPolicyConfig.model_fields if name in kwargs}
        if isinstance(given.get("kv_policy_config"), str):
            given["kv_policy_config"] = parse_json_object("kv_policy_config", given["kv_policy_config"])
        super().__init__(model, **engine_arguments(given, kwargs))
