"""The environment that the steps run in, made from the carried wheels and the packages of the machine."""

from __future__ import annotations

import json
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

NEEDED = ("pytest", "xdist", "hypothesis", "pydantic", "typer", "safetensors", "prometheus_client")
"""Modules that the steps import, beside torch."""


def commit() -> str | None:
    """Return this checkout's commit, marked if files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def prepared(folder: Path) -> dict[str, Any]:
    """Return what `prepare` wrote about its files; empty if it was not run."""
    path = folder / "prepared.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def interpreter(folder: Path) -> str:
    """Return a Python with everything the steps import.

    That is this one if it has all of it, else one of a virtual environment: the wheels that were carried, and behind
    them the packages of this one.

    Raises:
        RuntimeError: something is missing and no wheels were carried.
    """
    missing = _missing(sys.executable)
    if not missing:
        return sys.executable
    found = sorted((folder / "wheels").glob("*.whl"))
    if not found:
        raise RuntimeError(
            f"{sys.executable} lacks {', '.join(missing)}, and {folder / 'wheels'} has no wheels; run "
            "`scripts/gpu_check.sh prepare` on a machine with a network and copy the folder"
        )
    own = folder / "venv"
    venv.create(own, system_site_packages=True, clear=True, with_pip=False, symlinks=True)
    python = str(own / "bin/python")
    # This Python may itself be that of a virtual environment, which the new one would not see.
    packages = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    packages.mkdir(parents=True, exist_ok=True)
    behind = [path for path in (*site.getsitepackages(), *_user_packages()) if Path(path).is_dir()]
    (packages / "of_this_machine.pth").write_text("\n".join(behind) + "\n")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-warn-script-location", "--target", str(packages)]
    _run([*command, *map(str, found)])
    if missing := _missing(python):
        raise RuntimeError(f"{', '.join(missing)} cannot be imported even with the carried wheels")
    return python


def _user_packages() -> list[str]:
    return [site.getusersitepackages()] if site.ENABLE_USER_SITE else []


def _missing(python: str) -> list[str]:
    """Return the modules that cannot be imported."""
    script = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    return _run([python, "-c", script, *NEEDED]).split()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def describe(python: str, folder: Path) -> dict[str, Any]:
    """Return what is known of the machine, see `machine.py`.

    Another process asks, because one that has used a GPU keeps some of its memory.

    Raises:
        RuntimeError: torch cannot be imported.
    """
    return {**json.loads(_run([python, "-m", "scripts.gpu_check.machine"])), "prepared": prepared(folder)}
