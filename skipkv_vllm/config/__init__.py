"""Configuration: one pydantic model for the server (`server`) and one for a request (`request`).

They are the only source of the command-line flags, their help and their page in the docs, and validate the values.
`integration.compat` checks what depends on the model and the engine.
"""

from .checks import check_budget, parse_json_object
from .request import KEEP_EVERYTHING, RequestOptions, ResolvedRequest, has_our_prefix
from .server import CONFIG_KEY, KVPolicyConfig, flag_names, shown_default

__all__ = [
    "CONFIG_KEY",
    "KEEP_EVERYTHING",
    "KVPolicyConfig",
    "RequestOptions",
    "ResolvedRequest",
    "check_budget",
    "flag_names",
    "has_our_prefix",
    "parse_json_object",
    "shown_default",
]
