"""Steps of the check of a bare GPU machine, made for tests."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from scripts.gpu_check.commands import Command
from scripts.gpu_check.run import Check, Results
from scripts.gpu_check.steps import Context, Step


def context(folder: Path, device: str = "cpu") -> Context:
    (folder / "scratch").mkdir(exist_ok=True)
    return Context(device, sys.executable, folder, folder / "scratch", is_tiny=True)


def python(name: str, script: str, **options: Any) -> Command:
    return Command(name, [sys.executable, "-c", script, "{figures}"], **options)


def step(number: int, *parts: Command | str, **options: Any) -> Step:
    what = parts[0] if isinstance(parts[0], str) else parts
    return Step(number, f"step {number}", "?", options.pop("limit", 20), lambda _: what, **options)


WRITE = "import json, sys; json.dump({'n': 3}, open(sys.argv[1], 'w'))"


def check(tmp_path: Path, *which: Step, device: str = "cpu", seconds: float = 60) -> tuple[int, dict[int, Any]]:
    results = Results(tmp_path / "results.json", {"torch": "x"})
    Check(context(tmp_path, device), results, time.monotonic() + seconds, factor=1).run(which)
    status = results.conclude()
    return status, {each["step"]: each for each in json.loads((tmp_path / "results.json").read_text())["steps"]}
