"""Apply the patches of this folder to a copy of the installed vLLM; the installed one is never changed.

The copy consists of links and takes a few hundred kilobytes: only patched files and their folders are real. Put the
folder that the command prints on PYTHONPATH, and Python imports the copy:

    PYTHONPATH=$(python patches/apply.py) vllm serve ...
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PATCHES = Path(__file__).resolve().parent
DEFAULT_COPY = PATCHES.parent / "build" / "patched-vllm"
MARKER = ".made-by-skipkv-patches"
"""Only a folder with this file may be deleted."""


class PatchError(RuntimeError):
    """A patch does not apply, or there is nothing to apply it to; the message gives the remedy."""


def patch_files(version: str, numbers: Sequence[str] = ()) -> list[Path]:
    """Return the patches for a version of vLLM in order; a folder has those that differ between versions.

    Args:
        version: such as 0.33.0+cpu.
        numbers: if given, only patches whose names begin with one of them.

    Raises:
        PatchError: there are none for this version, or no patch has one of the numbers.
    """
    minor = ".".join(version.split(".")[:2])
    if not (PATCHES / minor).is_dir():
        supported = ", ".join(sorted(folder.name for folder in PATCHES.glob("[0-9]*.[0-9]*") if folder.is_dir()))
        raise PatchError(f"there are no patches for vLLM {version}; there are for: {supported}")
    found = sorted([*PATCHES.glob("[0-9]*.patch"), *PATCHES.glob(f"{minor}/*.patch")], key=lambda path: path.name)
    unknown = [n for n in numbers if not any(patch.name.startswith(n) for patch in found)]
    if unknown:
        raise PatchError(f"no patch begins with {', '.join(unknown)}; there are: {', '.join(p.stem for p in found)}")
    return [patch for patch in found if not numbers or patch.name.startswith(tuple(numbers))]


def touched_files(patch: Path) -> list[str]:
    """Return the paths that a patch changes or adds, such as `vllm/engine/arg_utils.py`."""
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)


def installed_vllm() -> Path:
    """Return the folder of the installed package without importing it.

    Raises:
        PatchError: vLLM is not installed, or Python would import a patched copy.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise PatchError("vLLM is not installed in this environment; run scripts/bootstrap.sh first")
    folder = Path(spec.origin).parent
    if spec.origin.startswith(str(DEFAULT_COPY)):
        raise PatchError(f"PYTHONPATH already points to the patched copy {folder.parent}; unset it first")
    return folder


def version_of(folder: Path) -> str:
    """Return the version of the package in a folder."""
    found = re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", (folder / "_version.py").read_text(), re.MULTILINE)
    if found is None:
        raise PatchError(f"{folder / '_version.py'} names no version")
    return found[1]


def link_farm(source: Path, target: Path, real: set[str]) -> None:
    """Recreate `source` as `target`: copy the files in `real`, and link everything else.

    Args:
        source: folder of a package.
        target: folder to create.
        real: paths relative to `source` that will be changed.
    """
    folders = {str(parent) for path in real for parent in Path(path).parents}
    target.mkdir()
    for entry in source.iterdir():
        if entry.name == "__pycache__":
            continue
        copy = target / entry.name
        if entry.name in folders:
            below = {path.partition("/")[2] for path in real if path.startswith(f"{entry.name}/")}
            link_farm(entry, copy, below)
        elif entry.name in real:
            shutil.copyfile(entry, copy)
        else:
            copy.symlink_to(entry)


def apply(patches: Sequence[Path], target: Path) -> None:
    """Create the patched copy `target/vllm`, replacing an older one.

    Raises:
        PatchError: naming the patch that does not apply, with the output of `patch`.
    """
    source = installed_vllm()
    if target.exists() and not (target / MARKER).exists() and any(target.iterdir()):
        raise PatchError(f"{target} exists and is not a patched copy; choose another folder with --to")
    if shutil.which("patch") is None:
        raise PatchError("the program `patch` was not found; Debian/Ubuntu: apt-get install patch")
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    (target / MARKER).touch()
    files = {path.removeprefix("vllm/") for patch in patches for path in touched_files(patch)}
    link_farm(source, target / "vllm", files)
    for patch in patches:
        command = ["patch", "--strip=1", "--fuzz=0", "--forward", "--no-backup-if-mismatch", f"--input={patch}"]
        done = subprocess.run(command, cwd=target, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(target)
            raise PatchError(
                f"{patch.name} does not apply to vLLM {version_of(source)} in {source}:\n{done.stdout}{done.stderr}"
            )


def main() -> None:
    """Run the command; it prints the folder for PYTHONPATH."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=DEFAULT_COPY, metavar="FOLDER", help=f"default: {DEFAULT_COPY}")
    parser.add_argument("--only", nargs="+", default=[], metavar="NUMBER", help="e.g. 0001 0003; default: all")
    options = parser.parse_args()
    try:
        patches = patch_files(version_of(installed_vllm()), options.only)
        apply(patches, options.to.absolute())
    except PatchError as error:
        sys.exit(f"error: {error}")
    print(f"applied: {', '.join(patch.stem for patch in patches)}", file=sys.stderr)
    print(options.to.absolute())


if __name__ == "__main__":
    main()
