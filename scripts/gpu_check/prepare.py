"""Gather what a bare CUDA machine lacks, on a machine with a network, nvcc and vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import attention
from .environment import ROOT, commit

MOST_BYTES = 30 * 2**20
"""Limit on all that is carried."""

PACKAGES = (
    *("pytest", "pytest-xdist>=3.6", "hypothesis"),  # for the tests
    *("pydantic>=2.12", "typer", "safetensors", "prometheus-client>=0.18"),  # what our own package imports
)

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
PYTHON = "3.12"

LIBRARIES = ("_skipkv_cuda.so", "_skipkv_cpu.so")


def prepare(folder: Path, *, architecture: str, builds: bool = True) -> int:
    """Gather everything and print its size.

    Args:
        folder: where to.
        architecture: of the CUDA machine, as nvcc names it.
        builds: whether to build our libraries, which takes minutes; else those in the folder stay.

    Returns:
        The exit status: 1 if something is missing or all of it is too large.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    if builds:
        build(folder, architecture)
    problems += [f"{name} was not built; see above" for name in LIBRARIES if not (folder / "lib" / name).is_file()]
    wheels(folder / "wheels")
    vllm = attention.carry(folder / "attention")
    prepared = {"commit": commit(), "architecture": architecture, "vllm": vllm, "python": PYTHON}
    (folder / "prepared.json").write_text(json.dumps(prepared, indent=1) + "\n")
    sizes = {name: _size(folder / name) for name in ("lib", "wheels", "attention", "prepared.json")}
    total = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {folder / name}")
    print(f"{total / 2**20:6.1f} MiB  in all, of at most {MOST_BYTES >> 20}")
    if total > MOST_BYTES:
        problems.append(f"{total >> 20} MiB are more than {MOST_BYTES >> 20}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def build(folder: Path, architecture: str) -> None:
    """Build both libraries by our `setup.py`, the CUDA one for one architecture."""
    built = folder / "built"
    environment = {"SKIPKV_BUILD_CPU": "1", "SKIPKV_BUILD_CUDA": "1", "SKIPKV_CUDA_ARCHITECTURES": architecture}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(built)]
    # Objects of other compilations must not be mistaken for these.
    command += ["--build-temp", str(folder / "objects")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    (folder / "lib").mkdir(exist_ok=True)
    for name in LIBRARIES:
        library = built / "skipkv_vllm/ops" / name
        if library.is_file():
            shutil.move(library, folder / "lib" / name)
    for leftover in (built, folder / "objects"):
        shutil.rmtree(leftover, ignore_errors=True)


def wheels(folder: Path) -> None:
    """Download wheels for the Python of the CUDA machine, with all that they need."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *PACKAGES], check=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
