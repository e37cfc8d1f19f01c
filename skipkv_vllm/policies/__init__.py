"""Eviction methods, one file each. `CONTRIBUTING.md` says how to add one."""

from . import full, h2o, random, rkv, skipkv, snapkv, streaming_llm  # noqa: F401  (importing registers them)
from .base import Need, Policy, SentenceOptions, View, make_policy, policy_names, register_policy

__all__ = ["Need", "Policy", "SentenceOptions", "View", "make_policy", "policy_names", "register_policy"]
