"""Checks and error messages that the server's configuration and a request's options share."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from ..core.errors import KVPolicyError
from ..core.needs import Need
from ..policies import Policy

MAX_ALPHA = 10.0
"""largest absolute steering strength"""

LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
}
"""Pydantic's type of an error -> how we say what is allowed, and the name of the limit."""

TYPES = {"int_type": "a whole number, such as 1024", "float_type": "a number", "string_type": "a text string"}
"""Pydantic's type of an error -> what the value should have been."""

OPTIONAL_NEEDS = {"sentence": Need.SENTENCES, "head": Need.NOTHING}
"""granularity -> what it needs on top of the policy"""


NEEDS_OF_RECALL = Need.QUERIES | Need.SENTENCES
"""what it takes to tell which evicted sentences are needed again"""

WITHOUT_RECALL = Need.SEGMENTS | Need.GATES | Need.LOOKAHEAD | Need.HIDDEN
"""inputs that are not stored with evicted tokens"""


def needs_of(policy: Policy, granularity: str, *, recalls: bool = False) -> Need:
    """Return what the workers must collect to run a policy at a granularity, and with tokens that come back."""
    needs = policy.needs | OPTIONAL_NEEDS[granularity]
    return needs | NEEDS_OF_RECALL if recalls and policy.name != "full" else needs


def check_recall(field: str, policy: Policy) -> None:
    """Raise `KVPolicyError` if tokens that this policy evicted cannot come back."""
    if policy.compacts_prompt:
        raise KVPolicyError(
            f"{field}={policy.name!r} always keeps the question, which tokens that come back could replace; drop "
            "--kv-recall-memory, or choose another method, such as skipkv, h2o or snapkv"
        )
    if missing := policy.needs & WITHOUT_RECALL:
        raise KVPolicyError(
            f"{field}={policy.name!r} reads {need_names(missing)}, which are not stored with evicted tokens, so none "
            "may come back; drop --kv-recall-memory, or choose another method, such as skipkv, h2o or snapkv"
        )


def check_budget(field: str, budget: int, policy: Policy, window: int, high: int | None = None) -> None:
    """Raise `KVPolicyError` unless the budget holds the window, the sinks and at least one more token."""
    low = window + policy.num_sinks + policy.num_question(window) + 1
    if budget < low or (high is not None and budget > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        sinks = f" + {policy.num_sinks} sinks" if policy.num_sinks else ""
        if num_question := policy.num_question(window):
            sinks += f" + question of {num_question}"
        raise KVPolicyError(
            f"{field}={budget} is out of range; allowed: {allowed} (window of {window} tokens{sinks} + 1"
            + ("" if high is None else ", up to max_model_len")
            + ")"
        )


def check_prompt(policy: Policy, is_protected: bool) -> None:
    """Raise `KVPolicyError` if the policy compacts the prompt but the prompt is protected."""
    if policy.compacts_prompt and is_protected:
        raise KVPolicyError(
            f"kv_policy={policy.name!r} compacts the prompt, which is protected; start the server with "
            "--no-kv-protect-prompt, or choose a method that leaves the prompt alone"
        )


def check_question(field: str, policy: Policy, window: int) -> None:
    """Raise `KVPolicyError` unless the question fits into the window, whose queries are the only ones recorded."""
    if (num_question := policy.num_question(window)) > window:
        raise KVPolicyError(
            f"{field}={num_question} is out of range; allowed: 1 to {window} (kv_window, whose queries are recorded); "
            "raise --kv-window or set fewer tokens"
        )


def need_names(needs: Need) -> str:
    """Return the names of needs for a message."""
    return " and ".join(str(need.name).lower() for need in Need if need in needs)


def describe(error: ValidationError) -> str:
    """Describe each failed field: name, value, what is allowed."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KVPolicyError):
            lines.append(str(cause))
        elif item["type"] == "extra_forbidden":
            lines.append(f"{field} is not an option")
        elif item["type"] in LIMITS:
            words, key = LIMITS[item["type"]]
            lines.append(f"{field}={item['input']!r} is out of range; allowed: {words} {item['ctx'][key]:g}")
        elif item["type"] in TYPES:
            lines.append(f"{field}={item['input']!r} is not {TYPES[item['type']]}")
        else:
            lines.append(f"{field}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def parse_json_object(flag: str, text: str) -> dict[str, Any]:
    """Read a JSON object from a flag.

    Raises:
        KVPolicyError: text that is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise KVPolicyError(
            f"{flag}: {text!r} is not valid JSON ({error}); quote it for the shell, e.g. '{{\"recent_share\": 0.4}}'"
        ) from None
    if not isinstance(value, dict):
        raise KVPolicyError(f"{flag}: {text!r} is JSON but not an object; write e.g. '{{\"recent_share\": 0.4}}'")
    return value
