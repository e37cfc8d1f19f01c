"""What a new vLLM changes for this package: the first step of a port.

    python -m skipkv_vllm.integration.compat.port 0.34.0

It downloads the wheel of that version and of a tested one, compares every watched symbol, and prints for each that
differs how this package uses it, the tests that cover it, and the difference. Nothing is installed or imported from
the wheels. docs/design/porting.md goes on from there.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from . import source_hashes, version
from .watched import MOVED, OVERRIDES, PRIVATE_NAMES, RELIED_ON, TESTS, WRAPPED

ELSEWHERE = ("model_executor", "third_party", "benchmarks")
"""Folders of vLLM in which no watched symbol is looked for."""


class Change(NamedTuple):
    """A watched symbol that differs in a new vLLM.

    Attributes:
        name: of the symbol in the tested version.
        what: what differs, in a phrase.
        diff: lines of a unified diff from the tested code to the new one; for a missing symbol, of nothing.
        elsewhere: files of the new version that define a symbol of that name, if it is missing.
    """

    name: str
    what: str
    diff: list[str]
    elsewhere: list[str]


def compare(old: Traversable, new: Traversable, tested: str) -> list[Change]:
    """Compare the watched symbols of two versions.

    Args:
        old: package folder of the tested version.
        new: package folder of the new one.
        tested: minor version of `old`.
    """
    record = version.record_of(tested)
    changes = []
    for name in record["symbols"]:
        found = version.differences(new, [name], record)
        if not found:
            continue
        file, path = source_hashes.split(name)
        before, after = (source_hashes.source(root, file, path) for root in (old, new))
        if after is None:
            changes.append(Change(name, "is missing", [], sorted(_definitions(new, path))))
            continue
        lines = difflib.unified_diff((before or "").splitlines(), after.splitlines(), "tested", "new", lineterm="")
        what = "has another signature" if "has the signature" in found[0] else "has different code"
        changes.append(Change(name, what, list(lines), []))
    return changes


def _definitions(root: Traversable, path: str) -> Iterator[str]:
    """Find the files that define a symbol."""
    last = path.rpartition(".")[2]
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name not in ELSEWHERE:
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith(".py"):
                text = entry.read_text(encoding="utf-8")
                if (f"def {last}(" in text or f"class {last}" in text) and path in source_hashes.symbols(text):
                    yield f"{prefix}{entry.name}"


def use(name: str) -> str:
    """Describe how this package uses a watched symbol."""
    owner, _, method = name.rpartition(".")
    ways = [f"overridden by {own.partition(':')[2]}" for own, bases in OVERRIDES.items() if owner in bases]
    moved = [here for symbols in MOVED for here in symbols.values()]
    if not ways and (name in WRAPPED or name in moved):
        ways.append("wrapped")
    ways += [f"defines {private}" for private, definitions in PRIVATE_NAMES.items() if name in definitions]
    if not ways:
        ways.append("relied on" if name in RELIED_ON else f"overridden in a subclass ({method})")
    return ", ".join(dict.fromkeys(ways))


def tests_of(name: str) -> tuple[str, ...]:
    """Return the tests that fail if a watched symbol no longer does what this package expects."""
    return TESTS[max((prefix for prefix in TESTS if name.startswith(prefix)), key=len)]


def report(changes: list[Change], tested: str, new: str, num_symbols: int) -> Iterator[str]:
    """Write the changes as text, line by line."""
    yield f"vLLM {new} against the tested {tested}: {len(changes)} of {num_symbols} watched symbols differ"
    for change in changes:
        yield ""
        yield f"== {change.name} {change.what}"
        yield f"   use: {use(change.name)}"
        yield f"   tests: {' '.join(tests_of(change.name))}"
        if change.elsewhere:
            yield f"   now defined in: {', '.join(change.elsewhere)}"
        yield from (f"   {line}" for line in change.diff)


def wheel(wanted: str, folder: Path) -> Traversable:
    """Return the package in the wheel of a version; it is downloaded into `folder` unless it is there.

    Raises:
        SystemExit: pip cannot download it; its message has been printed.
    """
    if not (found := list(folder.glob(f"vllm-{wanted}-*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--dest", str(folder), f"vllm=={wanted}"]).returncode:
            raise SystemExit(f"error: vLLM {wanted} cannot be downloaded; name a version that the package index has")
        found = list(folder.glob(f"vllm-{wanted}-*.whl"))
    return zipfile.Path(found[0], "vllm/")


def main() -> None:
    """Run the command; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", metavar="NEW", help="version to compare, such as 0.34.0")
    parser.add_argument(
        "--tested",
        choices=version.supported(),
        default=version.supported()[-1],
        help="tested version to compare it with (default: %(default)s)",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="keep the wheels here, and use those that are there"
    )
    options = parser.parse_args()
    record = version.record_of(options.tested)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.wheels or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        changes = compare(wheel(record["vllm"], folder), wheel(options.new, folder), options.tested)
    print("\n".join(report(changes, record["vllm"], options.new, len(record["symbols"]))))
    sys.exit(bool(changes))


if __name__ == "__main__":
    main()
