"""Entry point `vllm.general_plugins`. Adds flags; changes nothing until a policy is asked for."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("vllm.skipkv")


def register() -> None:
    """Add our flags to vLLM's. vLLM calls it in every process, possibly more than once.

    It never raises: a vLLM that it cannot join runs as if this package were not installed.
    """
    try:
        from .integration.compat import install

        install()
    except Exception as error:
        # A server that asks for a policy ends with vLLM's "unrecognized arguments"; say why.
        is_asked = any(argument.replace("_", "-").startswith("--kv-policy") for argument in sys.argv)
        logger.log(
            logging.ERROR if is_asked else logging.DEBUG,
            "SkipKV: --kv-policy is not available under this vLLM: %s",
            error,
            exc_info=not is_asked,
        )
