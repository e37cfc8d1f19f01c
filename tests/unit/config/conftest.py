"""vLLM's parser with the plugin's flags."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from skipkv_vllm.plugin import register


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    register()
    register()  # twice, because vLLM may do so
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    return parser


@pytest.fixture
def engine_args(parser, tmp_path) -> Callable[..., EngineArgs]:
    # An existing folder, so that vLLM does not query a model hub.
    return lambda *flags: EngineArgs.from_cli_args(parser.parse_args(["--model", str(tmp_path), *flags]))
