"""The one room that knows vLLM's private names. Everything here is checked against a pinned version."""

from .cli import engine_arguments, install_flags
from .gate import SUPPORTED_VLLM, check_signatures, check_version
from .refusals import check_config, check_kv_cache
from .seams import enable, has_policy, install_config_check, policy_config

__all__ = [
    "SUPPORTED_VLLM",
    "check_config",
    "check_kv_cache",
    "check_signatures",
    "check_version",
    "enable",
    "engine_arguments",
    "has_policy",
    "install_config_check",
    "install_flags",
    "policy_config",
]
