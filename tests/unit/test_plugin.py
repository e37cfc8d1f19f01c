"""An installed plugin leaves every vLLM unchanged until a policy is configured, whatever that vLLM lacks."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from typing import NamedTuple

import pytest

from skipkv_vllm import plugin
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration.compat import flags, hooks
from tests.harness import REPOSITORY

ARGUMENTS = "vllm/engine/arg_utils.py"
STOCK_ARGUMENTS = """
class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        return parser
    @classmethod
    def from_cli_args(cls, args):
        return cls()
    def create_engine_config(self):
        return None
"""
PACKAGE = {"vllm/engine/__init__.py": ""}
POOL = "def _check_enough_kv_cache_memory(another, kind, *, entirely): return 1"
FAKES = {
    "nothing": {},
    "no arguments": PACKAGE,
    "arguments that cannot be imported": PACKAGE | {ARGUMENTS: "import vllm.gone"},
    "arguments without their class": PACKAGE | {ARGUMENTS: ""},
    "a class without methods": PACKAGE | {ARGUMENTS: "class EngineArgs: pass"},
    "methods of another kind": PACKAGE | {ARGUMENTS: STOCK_ARGUMENTS.replace("@classmethod", "@staticmethod")},
    "one method less": PACKAGE | {ARGUMENTS: STOCK_ARGUMENTS.replace("create_engine_config", "create_config")},
}
"""Files of a vLLM without the symbols that we use; `vllm/__init__.py` is always present."""
OTHER_POOL = PACKAGE | {
    ARGUMENTS: STOCK_ARGUMENTS,
    "vllm/v1/__init__.py": "",
    "vllm/v1/core/__init__.py": "",
    "vllm/v1/core/kv_cache_utils.py": POOL,
}


class Fake(NamedTuple):
    """A vLLM to join: its files, its version (None: it has none) and the arguments of the command that runs."""

    files: dict[str, str]
    version: str | None
    argv: list[str] = []


CASES = {
    **{name: Fake(files, "0.34.0") for name, files in FAKES.items()},
    "asked under 0.34.0": Fake({}, "0.34.0", ["serve", "m", "--kv-policy=skipkv"]),
    "asked without a version": Fake({}, None, ["serve", "m", "--kv_policy", "skipkv"]),
    "asked under 0.32.0": Fake(FAKES["one method less"], "0.32.0", ["serve", "m", "--kv-policy", "skipkv"]),
    "other pool of 0.33.0": Fake(OTHER_POOL, "0.33.0"),
    "other pool of 0.32.1": Fake(OTHER_POOL, "0.32.1"),
}

CODE = """
import importlib, io, json, logging, sys
from pathlib import Path
from skipkv_vllm.integration.compat import seams
from skipkv_vllm.plugin import register

found = {}
for number, (name, (files, version, argv)) in enumerate(json.load(sys.stdin).items()):
    root = Path(sys.argv[-1], str(number))
    files["vllm/__init__.py"] = "" if version is None else f"__version__ = {version!r}"
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    for module in [module for module in sys.modules if module.split(".")[0] == "vllm"]:
        del sys.modules[module]
    seams.is_public.cache_clear()
    importlib.invalidate_caches()
    sys.path.insert(0, str(root))
    sys.argv[1:-1] = argv
    log = io.StringIO()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=log, force=True)
    pool = None
    if "vllm/v1/core/kv_cache_utils.py" in files:
        import vllm.v1.core.kv_cache_utils as pool
    register()
    register()
    arguments = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", object)
    hooked = pool is not None and hasattr(pool._check_enough_kv_cache_memory, "_skipkv")
    found[name] = [hasattr(arguments, "_skipkv"), hooked, log.getvalue()]
print(json.dumps(found))
"""


class Joined(NamedTuple):
    """What `register` did: whether it added flags, whether it hooked the pool's check, and what it logged."""

    has_flags: bool
    has_hook: bool
    log: str


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Join every vLLM of `CASES`, in a process that has never seen the real one."""
    folder = tmp_path_factory.mktemp("fakes")
    command = [sys.executable, "-c", CODE, str(folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: Joined(*found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", FAKES)
def test_a_vllm_without_what_we_touch_is_left_alone(joined, name):
    assert joined[name] == Joined(False, False, ""), "without a policy nothing may be logged"


@pytest.mark.parametrize(
    ("version", "found"), [("under 0.34.0", "0.34.0"), ("without a version", "an unknown version")]
)
def test_who_asks_for_a_policy_there_reads_why_there_are_no_flags(joined, version, found):
    log = joined[f"asked {version}"].log
    for part in (
        "--kv-policy is not available",
        f"{version.removeprefix('under ').replace('without a', 'an unknown')} is installed",
        "pip install",
    ):
        assert part in log


def test_other_arguments_of_a_supported_version_are_named(joined):
    assert "create_engine_config is missing" in joined["asked under 0.32.0"].log


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1"])
def test_a_pool_check_of_another_kind_is_left_alone(joined, version):
    assert joined[f"other pool of {version}"] == Joined(True, False, "")


def test_nothing_of_ours_that_fails_reaches_vllm(monkeypatch, caplog):
    def broken():
        raise RuntimeError("broken")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr("skipkv_vllm.integration.compat.install", broken)
    plugin.register()
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--kv-policy", "skipkv"])
    plugin.register()
    assert "not available under this vLLM: broken" in caplog.text


def test_a_later_vllm_may_hand_its_parser_more_arguments():
    class Later:
        @staticmethod
        def add_cli_args(parser, further):
            return parser, further

        @classmethod
        def from_cli_args(cls, args, *, another):
            return args, another

        def create_engine_config(self):
            return argparse.Namespace()

    class Broken(hooks.PolicyArguments):
        def add_cli_args(self, parser):
            raise RuntimeError("broken")

    hooks._wrap_engine_args(Later, Broken())
    assert Later.add_cli_args("parser", 3) == ("parser", 3)
    args = argparse.Namespace()
    assert Later.from_cli_args(args, another=4) == (args, 4)


def test_a_flag_that_vllm_has_itself_is_vllms(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(flags, "_added", set())
    monkeypatch.setattr(flags.logger, "warning", lambda message, *args: warnings.append(message % args))
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-window", type=int, default=4096)
    flags.add_flags(parser)
    assert "its own flags --kv-window" in warnings[0]
    args = parser.parse_args([])
    assert vars(flags.update_arguments(args)) == {"kv_window": 4096}


def test_a_configuration_of_another_kind_has_no_policy():
    assert not flags.has_policy(object())  # type: ignore[arg-type]
    assert not flags.has_policy(argparse.Namespace(additional_config=3))  # type: ignore[arg-type]


def test_the_version_is_looked_at_before_the_configuration(monkeypatch):
    def other_version():
        raise KVPolicyError("another version")

    monkeypatch.setattr(hooks, "check_vllm", other_version)
    config = argparse.Namespace(additional_config={"skipkv": {"kv_policy": "skipkv"}})
    with pytest.raises(KVPolicyError, match="another version"):
        hooks.PolicyArguments().check_config(config)  # type: ignore[arg-type]


def test_metrics_of_another_vllm_do_nothing_without_a_policy(monkeypatch):
    from skipkv_vllm.integration.metrics import EvictionStatLogger

    class Later(EvictionStatLogger):
        pass

    # As if a later vLLM had one more method that every logger must have.
    assert not EvictionStatLogger.__abstractmethods__
    logger = Later(object(), 0, "further", another="argument")  # type: ignore[arg-type]
    logger.record(None, None, further="argument")
    logger.log_engine_initialized()
