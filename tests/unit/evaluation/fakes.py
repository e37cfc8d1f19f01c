"""Fake engines for runs of evaluations."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation.engine import Done, Job, Scores, Setup
from skipkv_vllm.evaluation.fidelity import TOP
from skipkv_vllm.evaluation.texts import Text

MODEL = str(bundled_model())


class Engines:
    """Stands in for engines: random log probabilities by text, worse by `harm` for a method."""

    def __init__(self, harm: float = 0.1, compactions: int | None = None, stop_after: int = 10**9) -> None:
        self.harm, self.compactions, self.left = harm, compactions, stop_after
        self.jobs: list[Job] = []
        self.groups: list[list[str]] = []

    @contextlib.contextmanager
    def __call__(self, setup: Setup, group: list[str], log: Path):
        self.groups.append(list(group))
        yield lambda jobs: (self._done(setup, job) for job in jobs)

    def _done(self, setup: Setup, job: Job) -> Done:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.jobs.append(job)
        rows, bound = len(job.tokens) - 1, setup.bound(job.budget)
        rng = np.random.default_rng(sum(job.tokens))
        logprobs = -rng.random((rows, 1 + TOP), np.float32)
        tokens = np.tile(np.arange(1 + TOP, dtype=np.int32), (rows, 1))
        full = job.method == "full"
        if not full:
            logprobs[bound:, 0] -= np.float32(self.harm)
        count = 0 if full or len(job.tokens) <= bound else self.compactions
        return Done(job.key, [1], 1 if count is None else count, Scores(tokens, logprobs))


TEXTS = [Text("a", number, tuple(range(number, number + 60))) for number in range(3)]
SETUP = Setup("no-such-model", longest=61, buffer=8)
