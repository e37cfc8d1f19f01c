"""How this package connects to vLLM: flags, checks, hooks, and the version check that makes them safe."""

from .flags import engine_arguments, has_policy, policy_config
from .hooks import enable, install, install_client_check
from .pool import block_pool, model_shape, most_step_tokens
from .refusals import check_attention, check_config, check_kv_cache
from .responses import install_reports
from .seams import is_public, received_orders, received_report, send_orders, send_report
from .version import check_vllm

__all__ = [
    "block_pool",
    "check_attention",
    "check_config",
    "check_kv_cache",
    "check_vllm",
    "enable",
    "engine_arguments",
    "has_policy",
    "install",
    "install_client_check",
    "install_reports",
    "is_public",
    "model_shape",
    "most_step_tokens",
    "policy_config",
    "received_orders",
    "received_report",
    "send_orders",
    "send_report",
]
