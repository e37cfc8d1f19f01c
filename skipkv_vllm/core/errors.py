"""Errors that this package raises on purpose."""

from __future__ import annotations


class KVPolicyError(ValueError):
    """Bad input, or a set-up in which the KV policy cannot act.

    The message names the field, the value, the allowed range and the remedy. vLLM's OpenAI server turns a
    `ValueError` raised while a request is validated into HTTP 400, so a bad request never stops it.

    Attributes:
        field: the field of the request's body at fault; empty for an option of ours.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field
