"""Version gate: what we override or call must be written as it was when it was tested.

`tested.json` has the signature and the hash of each such class and method, for vLLM as it comes and with the patches
of this repository. It is written by `python -m skipkv_vllm.integration.compat.record`. The check reads vLLM's files as
text: it imports none of them, and a file that is the tested one to the byte is not even parsed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...core.errors import KVPolicyError
from . import sources

SUPPORTED_VLLM = "0.32"
TESTED = Path(__file__).with_name("tested.json")
OVERRIDE = "SKIPKV_ALLOW_UNTESTED_VLLM"

logger = logging.getLogger("vllm.skipkv")


@functools.cache
def tested() -> dict[str, Any]:
    """The record: `vllm` (version), `files` (hashes by file) and `symbols` (signatures and hashes by symbol)."""
    return json.loads(TESTED.read_text())


def vllm_root() -> Path:
    """Folder of the vLLM that this process imports.

    Raises:
        ImportError: vLLM is not installed.
    """
    spec = importlib.util.find_spec(sources.PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("vLLM is not installed")
    return Path(spec.origin).parent


@functools.cache
def check_vllm() -> None:
    """Refuse a vLLM that this package was not tested with.

    Raises:
        KVPolicyError: naming every symbol that differs and the ways out.
    """
    check_version()
    check_sources()


def check_version() -> None:
    """Refuse another minor version.

    Raises:
        KVPolicyError: naming both versions and the ways out.
    """
    import vllm

    version = getattr(vllm, "__version__", "without a version")
    if ".".join(version.split(".")[:2]) != SUPPORTED_VLLM:
        _refuse(f"skipkv-vllm supports vLLM {SUPPORTED_VLLM}.x and found {version}")


def check_sources() -> None:
    """Refuse a vLLM whose code differs where it matters to us.

    Raises:
        KVPolicyError: naming every symbol that differs and the ways out.
    """
    wrong = differences(vllm_root()) + replaced()
    if wrong:
        _refuse(f"this vLLM differs from the {tested()['vllm']} that was tested: {'; '.join(wrong)}")


def is_tested(symbol: str) -> bool:
    """Whether this vLLM has a symbol as it was tested, or the operator allowed an untested vLLM.

    For what must be hooked before it is known whether a policy is asked for: elsewhere vLLM is left alone.

    Args:
        symbol: one of the record.
    """
    return _is_overridden() or not differences(vllm_root(), [symbol])


def _is_overridden() -> bool:
    return os.environ.get(OVERRIDE) == "1"


def _refuse(what: str) -> None:
    version = tested()["vllm"]
    if _is_overridden():
        logger.warning(
            "SkipKV: WARNING: %s. Started all the same because %s=1: answers may be WRONG WITHOUT A SIGN. "
            "Compare them with the same requests without --kv-policy.",
            what,
            OVERRIDE,
        )
        return
    raise KVPolicyError(
        f"{what}. Ways out: run `pip install 'vllm=={version}'`; install a skipkv-vllm release made for your vLLM; "
        f"start without --kv-policy; or, at your own risk, set {OVERRIDE}=1 (wrong answers would not be noticed)"
    )


def differences(root: Path, symbols: Iterable[str] | None = None) -> list[str]:
    """What a vLLM has other than the record, a phrase for each symbol.

    Args:
        root: folder of the package `vllm`.
        symbols: those to compare; None for all of the record.
    """
    record, wrong = tested(), []
    by_file: dict[str, list[str]] = {}
    for name in record["symbols"] if symbols is None else symbols:
        by_file.setdefault(sources.split(name)[0], []).append(name)
    for file, names in by_file.items():
        text = sources.read(root, file)
        if (sources.digest(text) if text is not None else None) in record["files"][file]:
            continue
        try:
            found = sources.symbols(text) if text is not None else {}
        except SyntaxError as error:
            wrong.append(f"{file} cannot be parsed ({error})")
            continue
        wrong += [phrase for name in names if (phrase := _difference(name, found, record["symbols"][name]))]
    return wrong


def _difference(name: str, found: dict[str, sources.Symbol], variants: list[list[str] | None]) -> str | None:
    _, path = sources.split(name)
    symbol = found.get(path)
    if symbol is None:
        # Only patched copies have it, or none has it any more.
        return None if None in variants else f"{name} is gone"
    known = [sources.Symbol(*variant) for variant in variants if variant is not None]
    if symbol in known:
        return None
    if symbol.signature not in {variant.signature for variant in known}:
        return f"{name} has the signature {symbol.signature} instead of {known[0].signature}"
    return f"{name} has other code (hash {symbol.digest} instead of {known[0].digest})"


def replaced() -> list[str]:
    """Functions that something else in this process has put in the place of vLLM's, a phrase for each.

    Only modules that are loaded already are looked at. A wrapper that names what it wraps (`functools.wraps`) passes.
    """
    wrong = []
    for name in tested()["symbols"]:
        module_name, _, path = name.partition(":")
        module = sys.modules.get(module_name)
        if module is None:
            continue
        found: Any = module
        for part in path.split("."):
            # What a class inherits is watched where it is defined.
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        function = inspect.unwrap(getattr(found, "__func__", found))
        if inspect.isfunction(function) and function.__code__.co_filename != module.__file__:
            wrong.append(f"{name} was replaced by {function.__module__}.{function.__qualname__}")
    return wrong
