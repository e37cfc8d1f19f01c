"""The model and the default arguments of engines for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from skipkv_vllm import bundled_model

REPOSITORY = Path(__file__).parents[2]
MODEL = os.environ.get("SKIPKV_TEST_MODEL") or bundled_model()
RUNNERS = {"v1-eager": ("v1", True), "v1-compiled": ("v1", False), "v2": ("v2", True)}
"""Model runner, and whether the model runs eagerly instead of compiled."""
PAGE = 32
ENGINE_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 128,
    "block_size": PAGE,
    # Few blocks, because the integrity check visits each of them after each step.
    "num_gpu_blocks_override": 256,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "async_scheduling": True,  # as on GPUs
    "disable_log_stats": True,
}
PUBLISHED = ("tova", "knorm", "keydiff", "manifoldkv", "obcache", "caote", "vatp", "longflow")
POLICY_ARGUMENTS: dict[str, Any] = {
    "kv_policy": "skipkv",
    "kv_budget": 224,
    "kv_buffer": 64,
    "kv_policy_config": {},
    "kv_request_policies": ["h2o", "snapkv", "random", "thinkv", *PUBLISHED],
    "kv_check_integrity": True,
}
