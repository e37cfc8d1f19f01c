"""Entry point `vllm.general_plugins`: adds our flags, and changes nothing until a policy is requested."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("vllm.skipkv")


def register() -> None:
    """Add our flags to vLLM's; vLLM calls this in every process, possibly more than once.

    It never raises: under an unsupported vLLM, everything runs as if this package were not installed.
    """
    try:
        from .integration.compat import install

        install()
    except Exception as error:
        # A command with --kv-policy ends with vLLM's "unrecognized arguments"; log the reason.
        is_requested = any(argument.replace("_", "-").startswith("--kv-policy") for argument in sys.argv)
        logger.log(
            logging.ERROR if is_requested else logging.DEBUG,
            "SkipKV: --kv-policy is not available under this vLLM: %s",
            error,
            exc_info=not is_requested,
        )
