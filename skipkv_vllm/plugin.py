"""Entry point `vllm.general_plugins`. Adds flags; changes nothing until a policy is asked for."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in every process, possibly more than once."""
    from .compat import install

    install()
