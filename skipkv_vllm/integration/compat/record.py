"""Record the watched symbols of this vLLM in `tested/`, after the tests have passed.

It reads the installed vLLM and the copy that `patches/apply.py` made:

    python -m skipkv_vllm.integration.compat.record --patched build/patched-vllm/vllm
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from . import source_hashes, version
from .seams import SEAMS
from .watched import MOVED, OVERRIDES, PRIVATE_NAMES, RELIED_ON, WRAPPED


def symbol_names() -> list[str]:
    """Return every symbol to watch, sorted; imports our modules and vLLM's."""
    names = {*WRAPPED, *RELIED_ON, *(symbol for symbols in PRIVATE_NAMES.values() for symbol in symbols)}
    names |= {version.located(symbols) for symbols in MOVED}
    names |= {seam.symbol for seam in SEAMS.values() if _is_callable(seam.symbol)}
    for own_name, base_names in OVERRIDES.items():
        own = _load(own_name)
        for base in map(_load, base_names):
            names |= {found for attribute in vars(own) if (found := _definition(base, attribute))}
    return sorted(names)


def _load(name: str) -> Any:
    module, _, path = name.partition(":")
    return getattr(importlib.import_module(module), path)


def _is_callable(marker: str) -> bool:
    # A field is watched with its class, and a list of validators with the function that calls them.
    return not marker.endswith((".extra", ".request_validators", ":kv_cache_memory_checks"))


def _definition(base: type, attribute: str) -> str | None:
    """Return the vLLM method that an attribute of a subclass of `base` overrides, or None."""
    for cls in base.__mro__:
        if attribute in vars(cls) and cls.__module__.startswith(f"{source_hashes.PACKAGE}."):
            if callable(getattr(cls, attribute)) and not isinstance(vars(cls)[attribute], type):
                return f"{cls.__module__}:{cls.__qualname__}.{attribute}"
            return None
    return None


def record(names: list[str], roots: list[Path], version: str) -> dict[str, Any]:
    """Return the record of some symbols.

    Args:
        names: of the symbols.
        roots: folders of variants of the package `vllm`, stock vLLM first.
        version: of the package.

    Raises:
        LookupError: a symbol that no variant defines.
    """
    files: dict[str, list[str | None]] = {}
    entries: dict[str, list[list[str] | None]] = {}
    for root in roots:
        defined: dict[str, dict[str, source_hashes.Symbol]] = {}
        for name in names:
            file, path = source_hashes.split(name)
            if file not in defined:
                text = source_hashes.read(root, file)
                defined[file] = source_hashes.symbols(text) if text is not None else {}
                _add(files.setdefault(file, []), source_hashes.digest(text) if text is not None else None)
            symbol = defined[file].get(path)
            _add(entries.setdefault(name, []), list(symbol) if symbol else None)
    missing = [name for name, variants in entries.items() if not any(variants)]
    if missing:
        raise LookupError(f"not defined in {', '.join(map(str, roots))}: {', '.join(missing)}")
    return {"vllm": version, "files": files, "symbols": entries}


def _add(variants: list[Any], variant: Any) -> None:
    if variant not in variants:
        variants.append(variant)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Required: a record without patched copies would refuse them.
    parser.add_argument("--patched", type=Path, metavar="FOLDER", required=True, help="vLLM with all patches applied")
    options = parser.parse_args()
    if not (options.patched / "__init__.py").exists():
        parser.error(f"--patched {options.patched} is not a package; create it with patches/apply.py")
    root = version.vllm_root()
    import vllm

    installed = vllm.__version__.partition("+")[0]
    written = record(symbol_names(), [root, options.patched], installed)
    path = version.TESTED / f"{version.minor(installed)}.json"
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{path}: {len(written['symbols'])} symbols of {len(written['files'])} files of {root}")


if __name__ == "__main__":
    main()
