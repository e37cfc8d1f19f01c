"""Eviction methods, one file each. `CONTRIBUTING.md` says how to add one."""

from . import (  # noqa: F401  (importing registers them)
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
    rkv,
    skipkv,
    snapkv,
    streaming_llm,
    tova,
    trimkv,
    vatp,
)
from .base import IN_THE_CACHE, Need, Policy, Probe, SentenceOptions, View, make_policy, policy_names, register_policy

__all__ = [
    "IN_THE_CACHE",
    "Need",
    "Policy",
    "Probe",
    "SentenceOptions",
    "View",
    "make_policy",
    "policy_names",
    "register_policy",
]
