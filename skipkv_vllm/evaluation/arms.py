"""Run methods at budgets over the same requests, save each result, and skip those already saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..core.errors import KVPolicyError
from . import RunError
from .engine import Answer, Done, Job, Setup
from .figures import FULL
from .machine import fingerprint, source, versions
from .store import Store

Serve = Callable[[Setup, Sequence[str], Path], AbstractContextManager[Answer]]
"""Starts an engine; see `engine.serve`."""


class Arm(NamedTuple):
    """A method at a budget in tokens; full KV has a budget of 0."""

    method: str
    budget: int

    def __str__(self) -> str:
        return "full KV" if self.method == FULL else f"{self.method} at {self.budget}"


WHOLE = Arm(FULL, 0)


class Request(NamedTuple):
    """A request that every arm runs.

    Attributes:
        name: unique within a run; results are saved under it.
        title: name in messages.
        tokens, num_new, top: see `engine.Job`.
    """

    name: str
    title: str
    tokens: Sequence[int]
    num_new: int = 1
    top: int | None = None


Keep = Callable[[Arm, Request, Done], dict[str, Any]]
"""Converts a finished request into the arrays to save."""


class Arms:
    """The arms of a run and the folder of its results.

    Args:
        setup: settings of all engines.
        out: folder of the results; those already in it are used.
        serve: starts engines.
        further: further values that all results depend on.
        code: further folders whose code all results depend on.

    Raises:
        KVPolicyError: the folder holds results of other settings.
    """

    def __init__(
        self, setup: Setup, out: Path, serve: Serve, further: Mapping[str, Any] | None = None, code: Sequence[Path] = ()
    ) -> None:
        self.setup, self.out, self._serve = setup, out, serve
        self.store = Store(out, settings_of(setup, code) | dict(further or {}))

    def run(self, wanted: Mapping[Arm, Sequence[Request]], keep: Keep, unit: str) -> None:
        """Run the requests without a saved result, full KV first.

        Args:
            wanted: requests of every arm.
            keep: called with each result; `load` returns the arrays that it returned.
            unit: unit of the progress bar.

        Raises:
            RunError: an engine failed, or a method never compacted a request that exceeds its bound.
        """
        missing = {
            arm: [request for request in requests if self.name(arm, request) not in self.store]
            for arm, requests in wanted.items()
        }
        total = sum(map(len, wanted.values()))
        methods = list(dict.fromkeys(arm.method for arm in wanted if arm != WHOLE))
        with tqdm(total=total, initial=total - sum(map(len, missing.values())), unit=unit) as bar:
            for number, group in enumerate(self.setup.groups(methods)):
                arms = [WHOLE] * (number == 0) + [arm for arm in wanted if arm.method in group]
                if any(missing.get(arm) for arm in arms):
                    with self._serve(self.setup, group, self.out / f"engine-{group[0]}.log") as answer:
                        for arm in arms:
                            self._run_arm(arm, missing.get(arm, []), answer, keep, bar)

    def _run_arm(self, arm: Arm, requests: Sequence[Request], answer: Answer, keep: Keep, bar: Any) -> None:
        if not requests:
            return
        bar.set_description(str(arm))
        by_name = {request.name: request for request in requests}
        jobs = [Job(each.name, arm.method, arm.budget, each.tokens, each.num_new, each.top) for each in requests]
        for done in answer(jobs):
            request = by_name[done.key]
            self._check(arm, request, done)
            self.store.save(self.name(arm, request), keep(arm, request, done))
            bar.update()

    def _check(self, arm: Arm, request: Request, done: Done) -> None:
        length, bound = len(request.tokens), self.setup.bound(arm.budget)
        if arm == WHOLE and done.compactions:
            raise RunError(f"full KV reports {done.compactions} compactions of {request.title}; this is a bug")
        if arm != WHOLE and length > bound and not done.compactions:
            raise RunError(
                f"{arm} made no compaction of {request.title}, although its {length} tokens exceed budget + buffer = "
                f"{bound}; its result would be full KV's. The engine's log is in {self.out}"
            )

    def load(self, arm: Arm, request: Request) -> dict[str, Any]:
        """Return the saved arrays of a request."""
        return self.store.load(self.name(arm, request))

    def name(self, arm: Arm, request: Request) -> str:
        """Return the name of a result: everything it depends on, except the settings of the folder."""
        if arm == WHOLE:
            return f"{FULL}/{request.name}"
        config = json.dumps(dict(self.setup.configs.get(arm.method, {})), sort_keys=True)
        own = "" if config == "{}" else f"-{hashlib.sha256(config.encode()).hexdigest()[:8]}"
        return f"{arm.method}{own}-{arm.budget}/{request.name}"


def settings_of(setup: Setup, code: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the settings that all results of a folder depend on; methods, budgets and texts may be added later."""
    own: Mapping[str, Any] = vars(setup)
    return {
        **{name: own[name] for name in ("model", "buffer", "window", "granularity", "num_seqs")},
        "engine": dict(setup.arguments),
        "model_digest": fingerprint(setup.model),
        "source_digest": source(*code),
        "versions": versions(),
    }


def check_methods(setup: Setup, methods: Sequence[str], budgets: Sequence[int], flag: str = "--budgets") -> None:
    """Raise `KVPolicyError` unless these methods can run at these budgets, which were given by `flag`."""
    check_each_once("--methods", methods)
    if FULL in methods:
        raise KVPolicyError("--methods: full is always measured; leave it out")
    check_each_once(flag, budgets)
    setup.check(methods, budgets, flag)


def check_each_once(flag: str, values: Iterable[Any]) -> None:
    """Raise `KVPolicyError` for an empty list of values, or one with duplicates."""
    values = list(values)
    if not values or len(set(values)) < len(values):
        raise KVPolicyError(f"{flag} {' '.join(map(str, values))}: give at least one value, and each once")


def budgets_of(ratios: Sequence[float], length: int) -> list[int]:
    """Return the budgets for ratios of a length to a budget: `length / ratio`, rounded down.

    Raises:
        KVPolicyError: a ratio below 1, or one given twice.
    """
    check_each_once("--ratio", (f"{ratio:g}" for ratio in ratios))
    for ratio in ratios:
        if not ratio >= 1:
            raise KVPolicyError(f"--ratio {ratio:g} is out of range; allowed: at least 1 (the length over the budget)")
    return [int(length / ratio) for ratio in ratios]
