"""The servers that the small engine is tested as."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from skipkv_vllm.config import KVPolicyConfig
from tests.small_engine.shape import Shape
from tests.small_engine.traffic import Traffic


@dataclass(frozen=True)
class Server:
    """A server and its requests.

    Attributes:
        options: of the server's policy, sizes left out.
        policies: methods that the requests take in turn; None is the server's own.
        shares, preempts, pauses: see `Traffic`.
    """

    options: dict[str, Any]
    policies: tuple[str | None, ...] = (None,)
    shares: bool = False
    preempts: bool = False
    pauses: bool = False

    def config(self, budget: int, buffer: int) -> KVPolicyConfig:
        """Return the configuration for a budget."""
        return KVPolicyConfig(kv_budget=budget, kv_buffer=buffer, kv_window=8, **self.options)

    def traffic(self, budget: int, buffer: int, num_steps: int) -> Traffic:
        """Return requests that fit the budget: most are compacted several times."""
        bound = budget + buffer
        return Traffic(
            self.policies,
            # Where the prompt may be evicted, some are longer than the bound.
            (bound // 4, bound // 2) if self.options.get("kv_protect_prompt", True) else (bound // 4, bound + buffer),
            (bound + buffer, bound + 9 * buffer),
            self.shares,
            preempt_every=37 if self.preempts else 0,
            pause_every=num_steps if self.pauses else 0,
        )


SERVERS = {
    "several methods": Server(
        {"kv_policy": "skipkv", "kv_request_policies": ["rkv", "snapkv", "h2o", "streaming_llm"]},
        (None, "rkv", "snapkv", "h2o", "streaming_llm"),
        preempts=True,
        pauses=True,
    ),
    "shared prompts": Server(
        {"kv_policy": "rkv", "kv_request_policies": ["knorm", "tova"], "kv_protect_prompt": False},
        (None, None, "tova", "knorm", None),
        shares=True,
        pauses=True,
    ),
    "hidden states": Server(
        {
            "kv_policy": "skipkv",
            "kv_policy_config": {"compat": "paper", "similarity_threshold": 0.5},
            "kv_compactions_per_step": 1,
        },
        preempts=True,
    ),
    "whole sentences": Server({"kv_policy": "skipkv", "kv_granularity": "sentence"}, pauses=True),
}


def shape_for(device: torch.device, layout: str, budget: int, buffer: int, **options: Any) -> Shape:
    """Return a shape with room for eight requests of such a budget; `options`: see `Shape`."""
    shape = replace(Shape(device, layout=layout), **options)
    longest = budget + 10 * buffer
    per_request = -(-(budget + 2 * buffer) // shape.block_size) + 1
    return replace(shape, max_length=longest, num_blocks=1 + per_request * shape.max_requests)
