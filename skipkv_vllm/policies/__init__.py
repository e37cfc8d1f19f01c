"""Eviction methods, one file each. `CONTRIBUTING.md` says how to add one."""

from ..core.needs import Need
from . import (  # noqa: F401  (the imports register them)
    caote,
    finch,
    full,
    h2o,
    keydiff,
    knorm,
    laq,
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
    trimkv,
    vatp,
)
from .base import (
    Held,
    HeldRequest,
    LookaheadPlan,
    Measured,
    Policy,
    SentenceOptions,
    View,
    check_policy_name,
    make_policy,
    policy_names,
    register_policy,
)

__all__ = [
    "Held",
    "HeldRequest",
    "LookaheadPlan",
    "Measured",
    "Need",
    "Policy",
    "SentenceOptions",
    "View",
    "check_policy_name",
    "make_policy",
    "policy_names",
    "register_policy",
]
