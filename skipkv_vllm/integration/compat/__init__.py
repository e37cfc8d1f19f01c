"""The one room that knows vLLM's private names. Everything here is checked against the version that was tested."""

from .flags import engine_arguments
from .pool import model_shape, page_pool
from .public import is_public, received_orders, received_report, send_orders, send_report
from .refusals import check_attention, check_config, check_kv_cache
from .reports import install_reports
from .seams import enable, has_policy, install, install_client_check, policy_config
from .version import SUPPORTED_VLLM, check_vllm

__all__ = [
    "SUPPORTED_VLLM",
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
    "page_pool",
    "policy_config",
    "received_orders",
    "received_report",
    "send_orders",
    "send_report",
]
