"""The steps of the check of a bare GPU machine: their limits, what they run, and what that does."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.gpu_check import compaction, run, sanitized, steps
from scripts.gpu_check.commands import GRACE
from scripts.gpu_check.requests import Requests
from scripts.gpu_check.steps import STEPS
from skipkv_vllm.ops import dispatch, native
from skipkv_vllm.ops.schema import NATIVE, SCHEMAS
from tests.unit.repository.gpu_checks import check, context

REPOSITORY = Path(__file__).parents[3]


def test_steps_that_judge_times_have_the_machine_for_themselves(tmp_path):
    quiet = {each.name for each in STEPS if each.needs_quiet}
    assert {"first compaction", "timings", "many"} <= quiet
    cold = replace(context(tmp_path, "cuda"), is_tiny=False)
    first = next(each for each in STEPS if each.name == "first compaction").commands(cold)
    assert [(each.name.split()[2], each.joins) for each in first] == [
        *(("native", False), ("native", False), ("triton", False), ("triton", True)),
    ]


def test_all_steps_together_fit_into_ten_minutes():
    """Even if each takes all its time, none is left out at the end."""
    assert sum(each.limit for each in STEPS if not each.in_background) + run.PREPARING <= run.TOTAL
    assert run.TOTAL + GRACE <= 600
    assert steps.TIMINGS_WITHIN + 20 <= steps.TIMINGS_LIMIT


def test_the_documentation_has_every_step():
    page = (REPOSITORY / "docs/operations/gpu-check.md").read_text()
    for each in STEPS:
        assert f"| {each.number} | {each.limit} | {each.question} |" in page


def test_on_a_gpu_each_step_names_files_that_exist(tmp_path):
    for each in STEPS:
        found = each.commands(context(tmp_path, "cuda"))
        assert not isinstance(found, str)
        for command in found:
            paths = [part for part in command.arguments if part.startswith("tests/")]
            assert all((REPOSITORY / path).is_file() for path in paths)
            assert bool(paths) == (command.junit is not None)


# ---- the sanitizer


def sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> dict[str, Any]:
    """Run step 4 with a double of `compute-sanitizer` that runs this script; return its result."""
    double = tmp_path / "compute-sanitizer"
    double.write_text(f"#!{sys.executable}\nimport sys, time\n{tool}\n")
    double.chmod(0o755)
    monkeypatch.setattr(steps, "tool_of_cuda", lambda name: str(double))
    (real,) = (each for each in STEPS if each.name == "sanitizer")
    _, found = check(tmp_path, replace(real, limit=2), device="cuda")
    assert [each["name"] for each in found[4]["commands"]] == ["memcheck", "racecheck"]
    return found[4]


def test_a_slow_sanitizer_is_told_apart_from_an_error_of_memory(tmp_path, monkeypatch):
    write = "open(sys.argv[sys.argv.index('--out') + 1], 'w').write('{\"done\": \"5 of 19 calls\"}')"
    slow = sanitizers(tmp_path, monkeypatch, f"{write}\ntime.sleep(60)")
    assert slow["status"] == "not finished"
    assert "memcheck: not finished after 2 s; done: 5 of 19 calls" in slow["reason"]
    assert "error" not in slow["reason"]
    wrong = sanitizers(tmp_path, monkeypatch, "raise SystemExit(9 if 'racecheck' in sys.argv else 0)")
    assert (wrong["status"], wrong["reason"]) == ("failed", "racecheck: exit status 9, racecheck found errors")
    broken = sanitizers(tmp_path, monkeypatch, "raise SystemExit(1)")
    assert broken["reason"] == "memcheck: exit status 1; racecheck: exit status 1"


class Recording:
    """A module of operators that notes which ones are called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.given: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        self.called.append(name)

        def call(*args: Any) -> Any:
            self.given.append(args)
            return getattr(native, name)(*args)

        return call


def test_the_sanitizer_sees_every_operator_in_few_calls():
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    recording, written = Recording(), list[dict[str, Any]]()
    sanitized.run(recording, "cpu", lambda figures: written.append(json.loads(json.dumps(figures))))
    assert set(recording.called) == NATIVE
    assert len(recording.called) <= 2 * len(NATIVE)
    optional = SCHEMAS["measure_attention"].split(", ").index("Tensor? sinks")
    measured = [
        args for name, args in zip(recording.called, recording.given, strict=True) if name.startswith("measure")
    ]
    assert all(args[optional] is not None for args in measured)
    assert [each["done"] for each in written] == [f"{i} of {len(sanitized.CALLS)} calls" for i in range(20)]


# ---- the first compaction


class Seen(TorchDispatchMode):
    """Notes PyTorch's operators with the dtypes of their tensors: each such pair may be a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[str, tuple[torch.dtype, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            dtypes = tuple(leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            self.kernels.add((str(func), dtypes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("warms_up", [False, True])
def test_the_first_compaction_loads_no_kernel_of_pytorch(monkeypatch, warms_up):
    """All that PyTorch does in it was done before, so the time is that of our own operators."""
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    before, new = Seen(), list[set[Any]]()
    real = Requests.compact

    def compact(self: Requests) -> dict[str, Any]:
        known = set(before.kernels)
        with Seen() as seen:
            found = real(self)
        assert seen.kernels
        if dispatch.choose("score_tokens", "cpu").backend == "native":
            new.append(seen.kernels - known)
        return found

    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    monkeypatch.setattr(Requests, "compact", compact)
    shape = compaction.shape_of(torch.device("cpu"), 64, 48)
    with before:
        figures = compaction.measure(shape, 64, 48, warms_up)
    assert new == [set(), set()]
    assert figures["operators"] == "native"
    assert dispatch.OVERRIDE not in os.environ
