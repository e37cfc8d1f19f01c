"""How figures were made: the record that a benchmark keeps, and the lines that pages show of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.machine import commit, machine, versions

from .markdown import counted


def record(
    module: str, settings: Mapping[str, Any], arguments: Sequence[str] | None = None, **further: Any
) -> dict[str, Any]:
    """Record how a summary is made, for its entry `run`.

    Args:
        module: the command is `python -m module`.
        settings: of the run; paths become text.
        arguments: words of the command line; None for those of this process.
        further: entries that only this benchmark has.
    """
    return {
        "command": ["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)],
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **further,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
    }


def made_by(run: Mapping[str, Any]) -> str:
    """State command, commit, date and machine of a record, as far as they are known, and its note."""
    when = f" on {run['date']}" if "date" in run else ""
    where = f", on {device(run['machine'])}" if "machine" in run else ""
    note = f" {run['note']}" if run.get("note") else ""
    return f"Made by `{shlex.join(run['command'])}` at commit `{run['commit']}`{when}{where}.{note}"


def device(machine: Mapping[str, Any]) -> str:
    """The GPUs of a machine, or its processor."""
    return " and ".join(machine.get("gpus", ())) or f"{counted(machine['cores'], 'core')} of {machine['cpu']}"


def how_it_was_made(run: Mapping[str, Any]) -> str:
    """The command in a block of its own; then commit, date, machine, time and versions."""
    machine = run["machine"]
    parts = [
        f"Commit `{run['commit']}`",
        run["date"],
        f"{counted(machine['cores'], 'core')} of {machine['cpu']}",
        f"{machine['memory_gib']} GiB",
        *machine["gpus"],
        f"{machine['processes']} {'process' if machine['processes'] == 1 else 'processes'}",
        f"{run['seconds'] / 60:.1f} minutes",
    ]
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"```\n{shlex.join(run['command'])}\n```\n\n{', '.join(parts)}. {packages}."
