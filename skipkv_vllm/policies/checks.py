"""Checks of policy parameters."""

from __future__ import annotations

from ..core.errors import KVPolicyError


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `KVPolicyError` unless the value is one of those allowed."""
    if value not in allowed:
        raise KVPolicyError(f"kv_policy_config: {field}={value!r} is unknown; choose one of: {', '.join(allowed)}")


def check_odd(field: str, value: int) -> None:
    """Raise `KVPolicyError` for an even value."""
    if value % 2 == 0:
        raise KVPolicyError(f"kv_policy_config: {field}={value} must be odd, e.g. {value + 1}")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise `KVPolicyError` unless low <= value <= high."""
    if not low <= value <= high:
        raise KVPolicyError(f"kv_policy_config: {field}={value!r} is out of range; allowed: {low} to {high}")
