"""Run the steps in order and write the results after each one."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import environment
from .commands import Command, Outcome, Process
from .steps import CPU_FACTOR, MOST_IMPORTANT, STEPS, Context, Step

TOTAL = 560
"""Limit on all steps together, in seconds."""

PREPARING = 10
"""Seconds of it for the carried wheels, about."""


@dataclass(frozen=True)
class Options:
    """The command line; see `__main__`."""

    folder: Path
    out: Path | None
    device: str | None
    steps: list[int] | None
    only_most_important: bool
    total: int
    tiny: bool


def run(options: Options) -> int:
    """Run the steps; return the exit status, 1 if a step failed or was not finished."""
    folder = options.folder.absolute()
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    out = (options.out or folder / "results.json").absolute()
    started = time.monotonic()
    try:
        python = environment.interpreter(folder)
        machine = environment.describe(python, folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if "device" in machine else "cpu")
    context = Context(device, python, folder, folder / "scratch", options.tiny, machine.get("architecture", ""))
    numbers = MOST_IMPORTANT if options.only_most_important else options.steps
    chosen = [step for step in STEPS if numbers is None or step.number in numbers]
    results = Results(out, machine | {"checked": device, "installed_after_s": round(time.monotonic() - started, 1)})
    factor = 1 if context.on_gpu else CPU_FACTOR
    Check(context, results, started + options.total * factor, factor).run(chosen)
    return results.conclude()


class Results:
    """The results so far, on disk after every change.

    Args:
        path: of the file.
        machine: what is known of the machine.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self._path, self._machine = path, machine
        self._steps: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._write()

    def add(self, step: Step, status: str, reason: str | None, outcomes: Sequence[Outcome] = ()) -> None:
        """Add or replace the result of a step."""
        found = {
            "step": step.number,
            "name": step.name,
            "question": step.question,
            "status": status,
            "reason": reason,
            "limit_s": step.limit,
            "seconds": round(sum(each.seconds for each in outcomes), 2),
            "commands": [dataclasses.asdict(each) for each in outcomes],
        }
        with self._lock:
            self._steps[step.number] = found
            self._write()
        if status != "running":
            reason = f": {reason}" if reason else ""
            print(f"{step.number:2} {step.name:17} {status}{reason}", flush=True)

    def _write(self) -> None:
        content = {"machine": self._machine, "steps": [self._steps[number] for number in sorted(self._steps)]}
        fresh = self._path.with_suffix(".new")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self._path)

    def conclude(self) -> int:
        """Print a summary and return the exit status."""
        print(f"results: {self._path}")
        steps = list(self._steps.values())
        bad = {
            status: [f"{each['step']} {each['name']}" for each in steps if each["status"] == status]
            for status in ("failed", "not finished")
        }
        for status, names in bad.items():
            print(f"{status.upper()}: {', '.join(names)}" if names else f"no step {status}")
        return 1 if any(bad.values()) else 0


class Check:
    """Runs steps.

    Args:
        context: where.
        results: where to write.
        deadline: when the last step must have ended, by `time.monotonic`.
        factor: by which limits are multiplied.
    """

    def __init__(self, context: Context, results: Results, deadline: float, factor: float) -> None:
        self._context, self._results, self._deadline, self._factor = context, results, deadline, factor
        self._background: list[threading.Thread] = []
        self._status: dict[int, str] = {}

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps in order; one that fails keeps none from running."""
        for step in steps:
            if step.needs_quiet:
                self._wait()
            commands = step.commands(self._context)
            if isinstance(commands, str):
                self._conclude(step, "skipped", commands)
            elif time.monotonic() > self._deadline - 2:
                self._conclude(step, "skipped", "no time was left; raise --total or choose with --steps")
            elif step.in_background:
                thread = threading.Thread(target=self._run, args=(step, commands))
                thread.start()
                self._background.append(thread)
                if self._status.get(0) not in (None, "passed"):
                    # The next steps need the library that is built.
                    thread.join()
            else:
                self._run(step, commands)
        self._wait()

    def _wait(self) -> None:
        """Wait for the steps in the background."""
        for thread in self._background:
            thread.join()

    def _conclude(self, step: Step, status: str, reason: str | None, outcomes: Sequence[Outcome] = ()) -> None:
        self._status[step.number] = status
        self._results.add(step, status, reason, outcomes)

    def _run(self, step: Step, commands: Sequence[Command]) -> None:
        self._results.add(step, "running", None)
        uses_built = self._status.get(0) not in (None, "passed") and self._status.get(1) == "passed"
        variables: dict[str, str] = self._context.environment(uses_built)
        outcomes: list[Outcome] = []
        end = min(time.monotonic() + step.limit * self._factor, self._deadline)
        own = [dataclasses.replace(each, environment={**variables, **each.environment}) for each in commands]
        for part in _together(own):
            processes = [Process(each, self._context.scratch) for each in part]
            outcomes += [each.outcome(end) for each in processes]
        self._conclude(step, *self._verdict(step, outcomes), outcomes)

    def _verdict(self, step: Step, outcomes: Sequence[Outcome]) -> tuple[str, str | None]:
        """Return the status of a step and the reason for it."""
        for status in ("failed", "not finished"):
            if reasons := [f"{each.name}: {each.reason}" for each in outcomes if each.status == status]:
                return status, "; ".join(reasons)
        skipped = [f"{each.name}: {each.reason}" for each in outcomes if each.status == "skipped"]
        if len(skipped) == len(outcomes):
            # On a GPU there is no reason to skip all of a step, but that a tool is missing.
            is_refused = all(each.is_unavailable for each in outcomes)
            return "skipped" if is_refused or not self._context.on_gpu else "failed", "; ".join(skipped)
        if self._context.on_gpu and (misses := step.misses({each.name: each.figures for each in outcomes})):
            return "failed", "; ".join(misses)
        left = [part for each in outcomes for part in each.figures.get("not_reached", ())]
        return "passed", "; ".join([*skipped, *([f"not reached in time: {', '.join(left)}"] if left else [])]) or None


def _together(commands: Sequence[Command]) -> list[list[Command]]:
    """Return the commands in groups that run beside each other."""
    groups: list[list[Command]] = []
    for command in commands:
        if command.joins and groups:
            groups[-1].append(command)
        else:
            groups.append([command])
    return groups
