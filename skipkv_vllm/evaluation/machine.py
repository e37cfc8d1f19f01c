"""Describe the environment of a run: versions, commit, processor."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import skipkv_vllm

PACKAGES = ("skipkv-vllm", "vllm", "torch", "transformers", "tokenizers", "math-verify", "lighteval", "datasets")
SMALL = 64 * 2**20


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that may affect a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of this source tree, with "-dirty" if tracked files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores this process may use, memory in GiB, and GPUs."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))}
    found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    found["gpus"] = _gpus()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def fingerprint(path: str) -> str:
    """Return a digest of a file or of a model's folder, or of the name if it does not exist.

    Files above 64 MiB count with their name and size only, because reading a large model takes minutes.
    """
    digest = hashlib.sha256(b"" if Path(path).exists() else path.encode())
    root = Path(path)
    for file in sorted(p for p in ([root] if root.is_file() else root.rglob("*")) if p.is_file() and p.suffix != ".md"):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root) if root.is_dir() else ''} {size}".encode())
        if size <= SMALL:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def source(*folders: Path) -> str:
    """Return a digest of the code that results depend on: modules and libraries of the package and further folders."""
    digest = hashlib.sha256()
    for folder in (Path(skipkv_vllm.__file__).parent, *folders):
        for file in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def relative(path: str) -> str:
    """Return a path relative to the working directory if it is below it, so that records are the same everywhere."""
    own = Path(path)
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else path
