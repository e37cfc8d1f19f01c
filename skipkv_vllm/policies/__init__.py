"""Eviction methods, one file each. `CONTRIBUTING.md` says how to add one."""

from ..core.needs import ACCUMULATED, IN_THE_CACHE, NUM_ACCUMULATED, OBSERVED, REPEATS, Need
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
    Measured,
    Policy,
    Probe,
    SentenceOptions,
    View,
    check_policy_name,
    make_policy,
    policy_names,
    register_policy,
)

__all__ = [
    "ACCUMULATED",
    "IN_THE_CACHE",
    "NUM_ACCUMULATED",
    "OBSERVED",
    "REPEATS",
    "Measured",
    "Need",
    "Policy",
    "Probe",
    "SentenceOptions",
    "View",
    "check_policy_name",
    "make_policy",
    "policy_names",
    "register_policy",
]
