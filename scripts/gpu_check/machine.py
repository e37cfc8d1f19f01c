"""Print the versions and names of this machine as JSON: `python -m scripts.gpu_check.machine`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .environment import commit


def describe() -> dict[str, Any]:
    """Return what the standard library, torch and the tools of the machine know."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "nvcc": _line(["nvcc", "--version"], -1),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        major, minor = properties.major, properties.minor
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
        found |= {
            "device": properties.name,
            # As nvcc names it, with the instructions of its own where it has such.
            "architecture": f"{major}{minor}" + ("a" if major >= 9 else ""),
            "multiprocessors": properties.multi_processor_count,
            "device_memory": properties.total_memory,
            "driver_and_clocks": _line(query, 0),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(command: list[str], place: int) -> str | None:
    """Return a line of a command's output; None if there is no such command."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[place] if lines else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    print(json.dumps(describe()))
