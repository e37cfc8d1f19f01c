"""An installed plugin leaves every vLLM as it is until a policy is asked for, whatever that vLLM lacks."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipkv_vllm import plugin
from skipkv_vllm.compat import cli, seams
from skipkv_vllm.errors import KVPolicyError

REPOSITORY = Path(__file__).parents[2]

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
FAKES = {
    "a package and nothing in it": {},
    "no arguments": {"vllm/engine/__init__.py": ""},
    "arguments that cannot be imported": {"vllm/engine/__init__.py": "", ARGUMENTS: "import vllm.gone"},
    "arguments without their class": {"vllm/engine/__init__.py": "", ARGUMENTS: ""},
    "a class without methods": {"vllm/engine/__init__.py": "", ARGUMENTS: "class EngineArgs: pass"},
    "methods of another kind": {
        "vllm/engine/__init__.py": "",
        ARGUMENTS: STOCK_ARGUMENTS.replace("@classmethod", "@staticmethod"),
    },
    "one method less": {
        "vllm/engine/__init__.py": "",
        ARGUMENTS: STOCK_ARGUMENTS.replace("create_engine_config", "create_config"),
    },
}
"""Files of a vLLM that lacks what we touch; `vllm/__init__.py` is always there."""

CODE = """
import logging, sys
logging.basicConfig(level=logging.ERROR, format="%(message)s")
import vllm
if "pool" in sys.argv:
    import vllm.v1.core.kv_cache_utils as pool
from skipkv_vllm.plugin import register
register()
register()
arguments = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", object)
print("flags added" if hasattr(arguments, "_skipkv") else "no flags")
if "pool" in sys.argv:
    print("pool hooked" if hasattr(pool._check_enough_kv_cache_memory, "_skipkv") else "pool alone")
"""


def run(root: Path, files: dict[str, str], version: str | None, *argv: str) -> subprocess.CompletedProcess[str]:
    """Join a vLLM made of these files, in a process of its own."""
    files = {"vllm/__init__.py": "" if version is None else f"__version__ = {version!r}"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY)])}
    command = [sys.executable, "-c", CODE, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", FAKES)
def test_a_vllm_without_what_we_touch_is_left_alone(tmp_path, name):
    done = run(tmp_path, FAKES[name], "0.34.0")
    assert (done.returncode, done.stdout) == (0, "no flags\n"), done.stderr
    assert done.stderr == "", "nothing is said where nobody asked for a policy"


@pytest.mark.parametrize("version", ["0.34.0", None])
def test_who_asks_for_a_policy_there_reads_why_there_are_no_flags(tmp_path, version):
    done = run(tmp_path, {}, version, "serve", "m", "--kv-policy=skipkv")
    assert done.returncode == 0
    for part in ("--kv-policy is not available", f"found {version or 'without a version'}", "pip install"):
        assert part in done.stderr


def test_other_arguments_of_a_supported_version_are_named(tmp_path):
    done = run(tmp_path, FAKES["one method less"], "0.32.0", "--kv-policy", "skipkv")
    assert "create_engine_config is gone" in done.stderr


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1"])
def test_a_pool_check_of_another_kind_is_left_alone(tmp_path, version):
    pool = "def _check_enough_kv_cache_memory(another, kind, *, entirely): return 1"
    packages = ("vllm/v1/__init__.py", "vllm/v1/core/__init__.py", "vllm/engine/__init__.py")
    files = dict.fromkeys(packages, "") | {"vllm/v1/core/kv_cache_utils.py": pool, ARGUMENTS: STOCK_ARGUMENTS}
    done = run(tmp_path, files, version, "pool")
    assert (done.returncode, done.stdout) == (0, "flags added\npool alone\n"), done.stderr


def test_nothing_of_ours_that_fails_reaches_vllm(monkeypatch, caplog):
    def broken():
        raise RuntimeError("broken")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr("skipkv_vllm.compat.install", broken)
    plugin.register()
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--kv-policy", "skipkv"])
    plugin.register()
    assert "not available under this vLLM: broken" in caplog.text


def test_a_flag_that_vllm_has_itself_is_vllms(monkeypatch, caplog):
    monkeypatch.setattr(cli, "_added", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-window", type=int, default=4096)
    cli.add_flags(parser)
    assert "flags of the name --kv-window" in caplog.text
    args = parser.parse_args([])
    assert vars(cli.update_arguments(args)) == {"kv_window": 4096}


def test_a_configuration_of_another_kind_has_no_policy():
    assert not seams.has_policy(object())  # type: ignore[arg-type]
    assert not seams.has_policy(argparse.Namespace(additional_config=3))  # type: ignore[arg-type]


def test_the_version_is_looked_at_before_the_configuration(monkeypatch):
    def other_version():
        raise KVPolicyError("another version")

    monkeypatch.setattr(seams, "check_vllm", other_version)
    config = argparse.Namespace(additional_config={"skipkv": {"kv_policy": "skipkv"}})
    with pytest.raises(KVPolicyError, match="another version"):
        seams.PolicyArguments().check_config(config)  # type: ignore[arg-type]


def test_metrics_of_another_vllm_do_nothing_without_a_policy(monkeypatch):
    from skipkv_vllm.metrics import EvictionStatLogger

    class Later(EvictionStatLogger):
        pass

    # As if a later vLLM had one more method that every logger must have.
    assert not EvictionStatLogger.__abstractmethods__
    logger = Later(object(), 0, "further", another="argument")  # type: ignore[arg-type]
    logger.record(None, None, further="argument")
    logger.log_engine_initialized()
