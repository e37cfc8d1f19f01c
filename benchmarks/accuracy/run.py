"""Run the grid: start the workers of each batch size, hand out the missing requests, grade and keep the answers."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from skipkv_vllm.evaluation.figures import FULL
from skipkv_vllm.evaluation.machine import commit, fingerprint, machine, source, versions
from skipkv_vllm.policies import make_policy

from . import RunError, UsageError, checks, worker
from .grading import check_available, grade
from .grid import Arm, Settings
from .pool import Pool
from .samples import Sample, SampleWriter, read_samples
from .tasks import Task, load_tasks

RESULTS = "results.jsonl"
RUN_INFO = "run_info.json"


class Run:
    """A run and its folder.

    Args:
        settings: what to run.
        out: folder of `results.jsonl` and `run_info.json`; an earlier run in it is resumed.
        processes: engines at work at once, each with its share of problems and cores.
        allow_code_execution: see `grading.check_available`.
        command: the command line, for the record.

    Raises:
        UsageError: bad input, or the folder holds a run with other settings.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        *,
        processes: int = 1,
        allow_code_execution: bool = False,
        command: Sequence[str] = (),
    ) -> None:
        self.settings, self.out, self.processes = settings, out, processes
        self.cores = sorted(os.sched_getaffinity(0))
        if not 1 <= processes <= len(self.cores):
            raise UsageError(f"--processes {processes} is out of range; allowed: 1 to {len(self.cores)} (cores)")
        self.tasks = load_tasks(settings.data, settings.problems, split=settings.split, jsonl=settings.jsonl)
        check_available(self.tasks[0].kind, allow_code_execution)
        self.references = {task.id: task for task in self.tasks}
        out.mkdir(parents=True, exist_ok=True)
        self.info = self._open(command)
        self.samples = {sample.key: sample for sample in read_samples(out / RESULTS)}
        self._arms: set[Arm] = set()

    def __call__(self) -> None:
        """Run what is missing.

        Raises:
            RunError: an engine failed, or a policy made no compaction where the length demanded one.
            KeyboardInterrupt: stopped; the same command goes on.
        """
        started, before = time.monotonic(), len(self.samples)
        self._save()  # also a run that is killed can be resumed
        writer = SampleWriter(self.out / RESULTS)
        try:
            for batch_size in self.settings.batch_sizes:
                self._run_batch_size(batch_size, writer)
        finally:
            writer.close()
            if len(self.samples) > before:
                session = {"seconds": round(time.monotonic() - started, 1), "samples": len(self.samples) - before}
                self.info["sessions"].append(session)
            self._save()
        found = checks.failures(self.grid_samples(), self.settings)
        self.info |= {"complete": True, "failures": found}
        self._save()
        if found:
            raise RunError(checks.describe(found))

    def grid_samples(self) -> list[Sample]:
        """The samples of this grid's arms and problems; the folder may hold more."""
        return [self.samples[key] for key in (key for arm in sorted(self._arms) for key in self._keys(arm))]

    # ---- the folder

    def _open(self, command: Sequence[str]) -> dict[str, Any]:
        """Read or begin `run_info.json`."""
        path = self.out / RUN_INFO
        tasks = fingerprint(self.settings.jsonl) if self.settings.jsonl else self._tasks_digest()
        identity = {
            "settings": self.settings.to_json(),
            "model_digest": fingerprint(self.settings.model),
            "vectors_digest": {name: fingerprint(file) for name, file in self.settings.vectors.items()},
            "tasks_digest": tasks,
            "source_digest": source(Path(__file__).parent),
            "versions": versions(),
        }
        fresh = identity | {
            "command": list(command),
            "commit": commit(),
            "machine": machine() | {"processes": self.processes},
            "date": time.strftime("%Y-%m-%d"),
            "sessions": [],
            "arm_seconds": {},
            "complete": False,
        }
        if not path.exists():
            if (self.out / RESULTS).exists():
                raise UsageError(f"--out {self.out} has a {RESULTS} but no {RUN_INFO}; use another folder")
            return fresh
        old = json.loads(path.read_text())
        different = _differences(old, identity)
        if different:
            raise UsageError(
                f"--out {self.out} holds a run with other settings; use another folder or the same settings:\n  "
                + "\n  ".join(different)
            )
        kept = ("sessions", "arm_seconds", "date", "kv_bytes_per_token")
        return fresh | {key: old[key] for key in kept if key in old}

    def _tasks_digest(self) -> str:
        text = repr([(task.id, task.messages, task.reference) for task in self.tasks])
        return f"{zlib.crc32(text.encode()):08x}"

    def _save(self) -> None:
        partial = self.out / (RUN_INFO + ".partial")
        partial.write_text(json.dumps(self.info, indent=1) + "\n")
        partial.replace(self.out / RUN_INFO)

    # ---- the grid

    def _keys(self, arm: Arm) -> Iterator[tuple[Arm, str, int]]:
        count = self.settings.count(arm.batch_size, len(self.tasks))
        for task in self.tasks[:count]:
            for number in range(self.settings.samples):
                yield arm, task.id, number

    def _missing(self, arms: Sequence[Arm]) -> list[tuple[Arm, str, int]]:
        self._arms.update(arms)
        return [key for arm in arms for key in self._keys(arm) if key not in self.samples]

    def _run_batch_size(self, batch_size: int, writer: SampleWriter) -> None:
        settings = self.settings
        first = [Arm(FULL, 0, batch_size)] if FULL in settings.policies else []
        budgets = self.info.get("budgets")
        if not budgets and not any(text.endswith("%") for text in settings.budgets):
            budgets = self.info["budgets"] = settings.tokens(None)
        # Shares of the length of full KV can only be resolved when it is there.
        stages = [first, None] if budgets is None else [first + settings.arms(batch_size, list(budgets.values()))]
        count = settings.count(batch_size, len(self.tasks)) * settings.samples
        arms = len(first) + len(settings.arms(batch_size, range(len(settings.budgets))))
        done = sum(key[0].batch_size == batch_size for key in self.samples)
        bar = tqdm(total=max(arms * count, done), initial=done, desc=f"batch {batch_size}", unit="answer")
        with bar:
            with self._workers(settings.shared, batch_size) as workers:
                for stage in stages:
                    if stage is None:
                        length = mean(self.samples[key].completion_tokens for key in self._keys(first[0]))
                        budgets = self.info["budgets"] = settings.tokens(length)
                        self.info["full_mean_length"] = length
                        stage = settings.arms(batch_size, list(budgets.values()))
                    self._run_stage([arm for arm in stage if arm.policy not in settings.own], workers, writer, bar)
            for policy in settings.own:
                with self._workers(settings.of(policy), batch_size) as workers:
                    stage = settings.arms(batch_size, list(self.info["budgets"].values()))
                    self._run_stage([arm for arm in stage if arm.policy == policy], workers, writer, bar)

    def _run_stage(self, arms: Sequence[Arm], workers: Pool, writer: SampleWriter, bar: Any) -> None:
        for part in [[arm] for arm in arms] if self.settings.separate_arms else [arms]:
            self._run_arms(part, workers, writer, bar)

    def _run_arms(self, arms: Sequence[Arm], workers: Pool, writer: SampleWriter, bar: Any) -> None:
        missing = self._missing(arms)
        if not missing:
            return
        workers.start()
        started = time.monotonic()
        index = {task.id: i for i, task in enumerate(self.tasks)}
        shares: list[list[worker.Request]] = [[] for _ in range(self.processes)]
        for arm, problem, number in missing:
            seed = zlib.crc32(f"{self.settings.seed}:{problem}:{number}".encode())
            request = worker.Request(arm, problem, self.references[problem].messages, number, seed)
            shares[index[problem] % self.processes].append(request)
        right = answers = 0
        for answer in workers.answers(shares):
            sample = _graded(answer, self.references[answer.request.problem])
            self.samples[sample.key] = sample
            writer.write([sample])
            self.info["kv_bytes_per_token"] = workers.kv_bytes_per_token
            answers, right = answers + 1, right + sample.correct
            bar.update()
            bar.set_postfix_str(f"{sample.arm.policy} {sample.steering}, {right / answers:.0%} right")
        if self.settings.separate_arms and len(missing) == len(list(self._keys(arms[0]))):
            self.info["arm_seconds"][str(arms[0])] = round(time.monotonic() - started, 2)

    @contextmanager
    def _workers(self, settings: Settings, batch_size: int) -> Iterator[Pool]:
        pool = Pool(settings, batch_size, self.processes, self.cores, self.out)
        try:
            yield pool
        except BaseException:
            pool.stop(patience=0)
            raise
        pool.stop(patience=20)


def execute(
    settings: Settings,
    out: Path,
    command: Sequence[str],
    *,
    processes: int,
    allow_code_execution: bool = False,
) -> None:
    """Check that model and policies can be served, and run the grid; see `Run`.

    Raises:
        KVPolicyError: bad input.
        RunError: the run failed.
    """
    if settings.model.startswith(("/", ".")) and not Path(settings.model).is_dir():
        raise UsageError(f"--model {settings.model}: there is no such folder; give a checkpoint's folder or its name")
    for name in settings.policies:
        served = settings.of(name) if name in settings.own else settings.shared
        make_policy(name, served.policy_config if served.evicting[:1] == (name,) else {}).check_complete()
    Run(settings, out, processes=processes, allow_code_execution=allow_code_execution, command=command)()


def _graded(answer: worker.Answer, task: Task) -> Sample:
    found = grade(task, answer.text)
    arm = answer.request.arm
    return Sample(
        policy=arm.policy,
        budget=arm.budget,
        batch_size=arm.batch_size,
        problem=answer.request.problem,
        number=answer.request.number,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason,
        compactions=answer.compactions,
        evicted_tokens=answer.evicted_tokens,
        tokens_digest=answer.tokens_digest,
        answer=found.answer,
        correct=found.correct,
        text=answer.text,
        steering=arm.steering,
        **answer.thoughts,
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what keeps a run from being resumed, a line per setting."""
    lines = []
    for part in ("model_digest", "vectors_digest", "tasks_digest", "source_digest"):
        if old.get(part) != new[part]:
            lines.append(f"{part.removesuffix('_digest')} has other contents than before")
    for part in ("settings", "versions"):
        for name in sorted(old[part].keys() | new[part].keys()):
            before, now = old[part].get(name), new[part].get(name)
            if part == "settings" and name in Settings.GROWS:
                if lost := [value for value in before or () if value not in now]:
                    lines.append(f"{name}: {', '.join(map(str, lost))} must not be left out; more may be added")
            elif before != now:
                lines.append(f"{name}: was {before!r}, is {now!r}")
    return lines


def load(out: Path) -> tuple[Settings, dict[str, Any], list[Sample]]:
    """Read settings, run information and samples of a finished run.

    Raises:
        UsageError: there is none, or it is not complete.
    """
    path = out / RUN_INFO
    if not path.exists():
        raise UsageError(f"{out} is not the folder of a run: it has no {RUN_INFO}")
    info = json.loads(path.read_text())
    if not info["complete"]:
        raise UsageError(f"the run in {out} is not complete; run its command again: {' '.join(info['command'])}")
    settings = Settings.from_json(info["settings"])
    return settings, info, read_samples(out / RESULTS)
