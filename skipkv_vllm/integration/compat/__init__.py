"""How this package connects to vLLM: flags, checks, hooks, and the version check that makes them safe."""

from .cache_groups import CacheGroups, cache_groups, draft_layers, evicting_layers, may_have_several_groups
from .flags import engine_arguments, has_policy, policy_config
from .heads import total_kv_heads
from .hooks import enable, install, install_client_check
from .host_memory import host_memory
from .pool import block_pool, check_bound_fits, model_shape, most_step_tokens, stored_pages
from .refusals import OTHER_MODEL, check_attention, check_config, refusal
from .responses import install_reports
from .seams import (
    is_public,
    received_orders,
    received_recalled,
    received_report,
    send_orders,
    send_recalled,
    send_report,
)
from .speculation import check_drafter, mark_draft_layers, num_draft_slots
from .version import check_vllm

__all__ = [
    "OTHER_MODEL",
    "CacheGroups",
    "block_pool",
    "cache_groups",
    "check_attention",
    "check_bound_fits",
    "check_config",
    "check_drafter",
    "check_vllm",
    "draft_layers",
    "enable",
    "engine_arguments",
    "evicting_layers",
    "has_policy",
    "host_memory",
    "install",
    "install_client_check",
    "install_reports",
    "is_public",
    "mark_draft_layers",
    "may_have_several_groups",
    "model_shape",
    "most_step_tokens",
    "num_draft_slots",
    "policy_config",
    "received_orders",
    "received_recalled",
    "received_report",
    "refusal",
    "send_orders",
    "send_recalled",
    "send_report",
    "stored_pages",
    "total_kv_heads",
]
