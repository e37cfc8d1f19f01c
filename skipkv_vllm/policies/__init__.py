"""Eviction methods, one file each. `CONTRIBUTING.md` says how to add one."""

from . import (  # noqa: F401  (importing registers them)
    caote,
    full,
    h2o,
    keydiff,
    knorm,
    longflow,
    manifoldkv,
    obcache,
    random,
    refused,
    rkv,
    skipkv,
    snapkv,
    streaming_llm,
    thinkv,
    tova,
    vatp,
)
from .base import (
    IN_THE_CACHE,
    OBSERVED,
    Need,
    Policy,
    SentenceOptions,
    View,
    check_policy_name,
    make_policy,
    policy_names,
    register_policy,
)

__all__ = [
    "IN_THE_CACHE",
    "OBSERVED",
    "Need",
    "Policy",
    "SentenceOptions",
    "View",
    "check_policy_name",
    "make_policy",
    "policy_names",
    "register_policy",
]
