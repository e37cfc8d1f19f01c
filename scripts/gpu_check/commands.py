"""Run the commands of a step, each for a limited time, and read what they found."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .environment import ROOT

GRACE = 5
"""Seconds in which an interrupted command may write what it has found."""

TAIL = 4000
"""Characters of a failed command's output that the results keep."""


@dataclass(frozen=True)
class Command:
    """A command of a step.

    Attributes:
        name: short, for the results.
        arguments: to be run in the repository's root; `{figures}` in one of them is replaced by the path of a file
            for the figures, JSON.
        environment: variables beside those of this process.
        junit: the command is pytest's and writes its report to this path.
        unavailable: words in the output of a failed command that say that the machine cannot run it.
        passes: exit statuses of a command that has passed.
        meanings: exit status -> what it says.
        joins: whether it starts beside the command before it, instead of after it.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    junit: Path | None = None
    unavailable: str | None = None
    passes: Sequence[int] = (0,)
    meanings: Mapping[int, str] = field(default_factory=dict)
    joins: bool = False


@dataclass
class Outcome:
    """What a command did.

    Attributes:
        name: of the command.
        status: "passed", "failed", "not finished" or "skipped".
        reason: why it did not pass.
        seconds: how long it took.
        figures: what it measured.
        tail: end of its output, unless it passed.
        is_unavailable: whether it was skipped because the machine cannot run it.
    """

    name: str
    status: str
    reason: str | None = None
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    tail: str | None = None
    is_unavailable: bool = False


def _allow_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """A command that runs.

    Args:
        command: what to run.
        scratch: folder for its output and its figures.
    """

    def __init__(self, command: Command, scratch: Path) -> None:
        self._command = command
        stem = command.name.replace(" ", "-").replace("/", "-")
        self._figures, self._output = scratch / f"{stem}.json", scratch / f"{stem}.log"
        for old in (self._figures, *([command.junit] if command.junit else [])):
            old.unlink(missing_ok=True)
        arguments = [part.replace("{figures}", str(self._figures)) for part in command.arguments]
        self._start = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        if shutil.which(arguments[0]) is None:
            return
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**os.environ, **command.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # In the background of a script, and so under `nohup`, shells let commands ignore interrupts.
                preexec_fn=_allow_interrupts,
            )

    def outcome(self, end: float) -> Outcome:
        """Wait until the command ends, or interrupt it at this time of `time.monotonic`, and then end it."""
        if self._process is None:
            reason = f"{self._command.arguments[0]} is not installed"
            return Outcome(self._command.name, "skipped", reason, is_unavailable=True)
        limit = end - self._start
        try:
            code = self._process.wait(max(end - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            self._end()
            code = None
        found = self._judge(code, limit)
        found.seconds = round(time.monotonic() - self._start, 2)
        if found.status != "passed":
            found.tail = self._output.read_text(errors="replace")[-TAIL:]
        return found

    def _end(self) -> None:
        """Interrupt the command, so that it writes what it has, and end whatever does not go."""
        assert self._process is not None
        for _ in range(2):  # Python may lose one, which comes while an object is destroyed
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE / 2)
                break
        # It leads a group of its own, with everything that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _judge(self, code: int | None, limit: float) -> Outcome:
        name, figures = self._command.name, self._read_figures()
        if code is None:
            return self._unfinished(limit, figures)
        unavailable = self._command.unavailable
        if code and unavailable and unavailable in self._output.read_text(errors="replace"):
            return Outcome(name, "skipped", f"this machine cannot: {unavailable}", is_unavailable=True)
        if self._command.junit is not None:
            return _of_pytest(name, self._command.junit, code)
        if code not in self._command.passes:
            meaning = self._command.meanings.get(code, "")
            return Outcome(name, "failed", f"exit status {code}{meaning and f', {meaning}'}", figures=figures)
        # A list names parts that were left out.
        if isinstance(figures.get("skipped"), str):
            return Outcome(name, "skipped", figures.pop("skipped"), figures=figures)
        return Outcome(name, "passed", figures=figures)

    def _unfinished(self, limit: float, figures: dict[str, Any]) -> Outcome:
        """Judge what an interrupted command had found."""
        name, reason = self._command.name, f"not finished after {limit:.0f} s"
        if self._command.junit is None or not self._command.junit.is_file():
            done = f"; done: {figures['done']}" if "done" in figures else ""
            return Outcome(name, "not finished", reason + done, figures=figures)
        found = _of_pytest(name, self._command.junit, 0)
        if found.status == "failed":
            found.reason = f"{found.reason}; {reason}"
            return found
        # The report has the interrupted test among those that passed.
        counted = {"begun" if key == "passed" else key: value for key, value in found.figures.items()}
        return Outcome(name, "not finished", reason, figures=counted)

    def _read_figures(self) -> dict[str, Any]:
        try:
            return json.loads(self._figures.read_text())
        except (OSError, ValueError):
            return {}


def _of_pytest(name: str, report: Path, code: int) -> Outcome:
    """Read pytest's report: counts, what was recorded with `figures`, and why tests failed or were skipped."""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(name, "failed", f"pytest wrote no report; exit status {code}")
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    recorded, reasons, failures = {}, [], []
    for case in cases:
        failure = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skip = case.find("skipped")
        counts["failed" if failure is not None else "skipped" if skip is not None else "passed"] += 1
        if failure is not None:
            failures.append(f"{case.get('name')}: {failure.get('message', '')[:200]}")
        if skip is not None:
            reasons.append(skip.get("message", ""))
        for each in case.iter("property"):
            if each.get("name") == "figures":
                recorded[str(case.get("name"))] = _plain(str(each.get("value")))
    figures = counts | ({"recorded": recorded} if recorded else {})
    if reasons:
        figures["why_skipped"] = sorted(set(reasons))[:8]
    if failures or code not in (0, 5):
        return Outcome(name, "failed", "; ".join(failures[:5]) or f"exit status {code}", figures=figures)
    if not counts["passed"]:
        return Outcome(name, "skipped", "; ".join(sorted(set(reasons))[:4]) or "no test was chosen", figures=figures)
    return Outcome(name, "passed", figures=figures)


def _plain(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
