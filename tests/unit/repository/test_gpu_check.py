"""The check of a bare GPU machine: all of it on a CPU, what it makes of failures, and what it carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import __main__ as command_line
from scripts.gpu_check import attention, commands, environment, prepare, run, steps
from scripts.gpu_check.commands import Command, Process
from scripts.gpu_check.steps import STEPS
from tests.unit.repository.gpu_checks import WRITE, check, context, python, step

REPOSITORY = Path(__file__).parents[3]


# ---- the whole check


def test_all_steps_run_on_a_cpu(tmp_path):
    """With few cases and small sizes. Only what needs a GPU or minutes is left out, with the reason."""
    attention.carry(tmp_path / "attention")
    out = tmp_path / "out/results.json"
    command = [REPOSITORY / "scripts/gpu_check.sh", "--tiny", "--device", "cpu", "--folder", tmp_path, "--out", out]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()[-8000:]
    found = json.loads(out.read_text())
    assert found["machine"]["checked"] == "cpu"
    assert found["machine"]["torch"]
    status = {each["step"]: each["status"] for each in found["steps"]}
    assert status == {step.number: "skipped" if step.number == 1 else "passed" for step in STEPS}
    assert all(each["reason"] for each in found["steps"] if each["status"] == "skipped")
    engine = next(each for each in found["steps"] if each["name"] == "engine")
    counts = {each["name"]: each["figures"]["passed"] for each in engine["commands"]}
    assert counts["carried attention"] >= 4
    (report,) = engine["commands"][1]["figures"]["recorded"].values()
    assert report["compactions"] > 0


# ---- steps that fail


def test_steps_after_a_failed_one_run_and_all_are_written(tmp_path):
    seen = f"import json; assert [s['status'] for s in json.load(open('{tmp_path}/results.json'))['steps']] == "
    status, found = check(
        tmp_path,
        step(0, python("fails", "print('why'); raise SystemExit(3)")),
        step(2, python("looks", seen + "['failed', 'running']")),
        step(3, "needs CUDA"),
        step(4, python("a", WRITE), python("b", "pass")),
    )
    assert status == 1
    assert {number: each["status"] for number, each in found.items()} == {
        0: "failed",
        2: "passed",
        3: "skipped",
        4: "passed",
    }
    assert (found[0]["reason"], found[3]["reason"]) == ("fails: exit status 3", "needs CUDA")
    assert found[0]["commands"][0]["tail"] == "why\n"
    assert [each["figures"] for each in found[4]["commands"]] == [{"n": 3}, {}]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_step_without_end_is_ended_with_all_its_processes(tmp_path):
    started = tmp_path / "started"
    script = (
        "import pathlib, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(100)'])\npathlib.Path('{started}').write_text(str(child.pid))\ntime.sleep(100)"
    )
    start = time.monotonic()
    status, found = check(tmp_path, step(0, python("sleeps", script), limit=5), step(2, python("b", "pass")))
    assert time.monotonic() - start < 50
    assert status == 1
    assert [found[number]["status"] for number in (0, 2)] == ["not finished", "passed"]
    # A process that was killed takes a moment to go.
    while is_alive(int(started.read_text())):
        assert time.monotonic() - start < 50
        time.sleep(0.05)


def test_a_step_for_which_no_time_is_left_is_skipped(tmp_path):
    status, found = check(tmp_path, step(0, python("a", "pass")), seconds=1)
    assert (status, found[0]["status"]) == (0, "skipped")
    assert "no time was left" in found[0]["reason"]


def test_a_background_step_does_not_hold_up_the_next_one(tmp_path):
    waits = f"import time, pathlib\nwhile not pathlib.Path('{tmp_path}/go').exists(): time.sleep(0.01)"
    status, found = check(
        tmp_path,
        step(0, python("a", "pass")),
        step(1, python("waits", waits), in_background=True),
        step(2, python("lets it go", f"open('{tmp_path}/go', 'w')")),
    )
    assert status == 0
    assert all(each["status"] == "passed" for each in found.values())


def test_commands_that_join_run_beside_each_other(tmp_path):
    script = (
        "import time, pathlib\npathlib.Path('{0}/{1}').touch()\n"
        "while not pathlib.Path('{0}/{2}').exists(): time.sleep(0.01)"
    )
    parts = [python(a, script.format(tmp_path, a, b), joins=a == "y") for a, b in (("x", "y"), ("y", "x"))]
    status, _ = check(tmp_path, step(0, *parts, limit=15))
    assert status == 0


def test_other_commands_run_one_after_the_other(tmp_path):
    """Times of one would otherwise be those of a machine on which another one compiles."""
    running = tmp_path / "running"
    alone = (
        f"import time, pathlib\nrunning = pathlib.Path('{running}')\nassert not running.exists()\n"
        "running.touch()\ntime.sleep(0.3)\nrunning.unlink()"
    )
    status, _ = check(tmp_path, step(0, python("a", alone), python("b", alone)))
    assert status == 0


def test_a_step_that_judges_times_waits_for_those_in_the_background(tmp_path):
    slow = python("slow", f"import time, pathlib; time.sleep(1); pathlib.Path('{tmp_path}/ended').touch()")
    times = python("times", f"import pathlib; assert pathlib.Path('{tmp_path}/ended').exists()")
    for needs_quiet, expected in ((True, "passed"), (False, "failed")):
        (tmp_path / "ended").unlink(missing_ok=True)
        _, found = check(tmp_path, step(1, slow, in_background=True), step(6, times, needs_quiet=needs_quiet))
        assert found[6]["status"] == expected


def test_what_was_found_before_the_end_is_kept(tmp_path, monkeypatch):
    """An interrupted pytest still reports its failures, and without any the step is not finished."""
    monkeypatch.setattr(commands, "GRACE", 60)  # on a busy machine pytest takes its time to end
    running = {}
    for outcome, expected in (("True", "not finished"), ("False", "failed")):
        folder = tmp_path / expected.replace(" ", "-")
        folder.mkdir()
        file = folder / "test_it.py"
        file.write_text(f"import time\n\ndef test_a():\n    assert {outcome}\n\ndef test_b():\n    time.sleep(200)\n")
        tests = steps.pytest(context(folder), "tests", [str(file)], "test")
        running[expected] = Process(tests, folder / "scratch")
    end = time.monotonic() + 15
    for expected, process in running.items():
        found = process.outcome(end)
        assert found.status == expected
        assert "not finished after 15 s" in found.reason
        assert found.figures.get("failed") == (1 if expected == "failed" else 0)
        assert "passed" not in found.figures or expected == "failed"
    assert time.monotonic() < end + 100


def test_a_command_that_does_not_heed_the_interruption_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "GRACE", 0.5)
    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    outcome = Process(python("stubborn", script), tmp_path).outcome(time.monotonic() + 1)
    assert outcome.status == "not finished"
    assert outcome.seconds < 10


def test_parts_that_were_not_reached_are_named_and_are_no_failure(tmp_path):
    script = "import json, sys; json.dump({'not_reached': ['64 x 4224', 'steps of 512']}, open(sys.argv[1], 'w'))"
    status, found = check(tmp_path, step(7, python("timings", script)), device="cuda")
    assert (status, found[7]["status"]) == (0, "passed")
    assert found[7]["reason"] == "not reached in time: 64 x 4224, steps of 512"


def test_the_built_library_takes_the_place_of_one_that_does_not_load(tmp_path):
    shows = python(
        "shows", "import json, os, sys; json.dump({'at': os.environ.get('SKIPKV_NATIVE_CPU')}, open(sys.argv[1], 'w'))"
    )
    fails = python("fails", "raise SystemExit(1)")
    _, found = check(tmp_path, step(0, fails), step(1, python("b", "pass"), in_background=True), step(2, shows))
    assert found[2]["commands"][0]["figures"]["at"] == str(context(tmp_path).built)
    _, found = check(tmp_path, step(0, fails), step(1, fails, in_background=True), step(2, shows))
    assert found[2]["commands"][0]["figures"]["at"] is None


@pytest.mark.parametrize(("device", "expected"), [("cpu", "skipped"), ("cuda", "failed")])
def test_a_step_of_skipped_tests_has_failed_on_a_gpu(tmp_path, device, expected):
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\n\ndef test_it():\n    pytest.skip('no library')\n")
    tests = steps.pytest(context(tmp_path, device), "tests", [str(file)], "test", workers=0)
    _, found = check(tmp_path, step(0, tests), device=device)
    assert found[0]["status"] == expected
    assert "no library" in found[0]["reason"]


@pytest.mark.parametrize(
    "refused",
    [
        python("tool", "print('Device not supported'); raise SystemExit(1)", unavailable="Device not supported"),
        Command("tool", ["no-such-tool"]),
    ],
    ids=["refuses", "missing"],
)
def test_a_tool_that_does_not_work_on_the_machine_is_no_failure(tmp_path, refused):
    status, found = check(tmp_path, step(0, refused), device="cuda")
    assert (status, found[0]["status"]) == (0, "skipped")


def test_figures_that_miss_their_limits_fail_a_step_on_a_gpu(tmp_path):
    def misses(figures: dict[str, Any]) -> list[str]:
        return [f"n is {figures['a']['n']}"]

    for device, expected in (("cuda", "failed"), ("cpu", "passed")):
        _, found = check(tmp_path, step(0, python("a", WRITE), misses=misses), device=device)
        assert found[0]["status"] == expected
    first = {"first compaction native": {"first_ms": 310.0}}
    assert steps._misses_of_first_compaction(first) == ["the first compaction took 310 ms, not below 300"]
    assert steps._misses_of_first_compaction({"first compaction native": {"first_ms": 90.0}}) == []


def test_figures_may_name_what_was_left_out(tmp_path):
    script = "import json, sys; json.dump({'skipped': json.loads(sys.argv[2])}, open(sys.argv[1], 'w'))"
    for skipped, status, left in (('"it is small"', "skipped", {}), ("[{}]", "passed", {"skipped": [{}]})):
        command = Command("a", [sys.executable, "-c", script, "{figures}", skipped])
        outcome = Process(command, tmp_path).outcome(time.monotonic() + 30)
        assert (outcome.status, outcome.figures) == (status, left)


def test_what_tests_record_and_why_they_fail_is_read(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "def test_good(record_property):\n    record_property('figures', {'n': 3})\n\n"
        "def test_bad():\n    assert 1 == 2, 'wrong sum'\n"
    )
    tests = steps.pytest(context(tmp_path), "tests", [str(file)], "test")
    outcome = Process(tests, tmp_path / "scratch").outcome(time.monotonic() + 30)
    assert outcome.status == "failed"
    assert "test_bad" in outcome.reason
    assert "wrong sum" in outcome.reason
    assert outcome.figures == {"passed": 1, "failed": 1, "skipped": 0, "recorded": {"test_good": {"n": 3}}}


# ---- choosing steps


def test_the_command_line_chooses_steps(tmp_path, monkeypatch):
    ran: list[list[int]] = []
    monkeypatch.setattr(run.environment, "interpreter", lambda _: sys.executable)
    monkeypatch.setattr(run.environment, "describe", lambda *_: {})
    monkeypatch.setattr(run.Check, "run", lambda self, chosen: ran.append([each.number for each in chosen]))
    where = ["--folder", str(tmp_path)]
    assert command_line.main([*where, "--only-most-important"]) == 0
    assert command_line.main(["run", *where, "--steps", "10", "0"]) == 0
    assert command_line.main(where) == 0
    assert ran == [[0, 2, 7, 8], [0, 10], list(range(11))]


# ---- what is carried


def test_the_kernel_of_vllm_is_carried_without_vllm(tmp_path):
    assert attention.carry(tmp_path).startswith("0.3")
    script = (
        "import sys\nsys.modules['vllm'] = None\n"
        "from paged_attention.triton_unified_attention import unified_attention, KVQuantMode\n"
        "assert callable(unified_attention) and KVQuantMode.NONE == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_import_that_the_stub_does_not_have_is_reported():
    source = "import torch\nfrom vllm.somewhere import something\n"
    with pytest.raises(RuntimeError, match=r"imports what the stub does not have: from vllm\.somewhere"):
        attention._with_our_imports("x.py", source)
    with pytest.raises(RuntimeError, match="has no Thing"):
        attention._definition("class Other: pass", "Thing")


@pytest.fixture
def gathering(monkeypatch, tmp_path):
    """`prepare` without its downloads."""

    def wheels(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.whl").write_bytes(bytes(2**20))

    monkeypatch.setattr(prepare, "wheels", wheels)
    (tmp_path / "lib").mkdir()
    for name in prepare.LIBRARIES:
        (tmp_path / "lib" / name).write_bytes(bytes(2**19))
    return tmp_path


def test_preparing_prints_the_size_and_says_what_was_prepared(gathering, capsys):
    assert command_line.main(["prepare", "--folder", str(gathering), "--without-build"]) == 0
    assert "2.1 MiB  in all, of at most 30" in capsys.readouterr().out
    prepared = environment.prepared(gathering)
    assert prepared["architecture"] == "90a"
    assert prepared["commit"] == environment.commit()


def test_preparing_fails_if_a_library_is_missing_or_all_is_too_large(gathering, capsys, monkeypatch):
    (gathering / "lib/_skipkv_cuda.so").unlink()
    monkeypatch.setattr(prepare, "MOST_BYTES", 2**20)
    assert prepare.prepare(gathering, architecture="80", builds=False) == 1
    errors = capsys.readouterr().err
    assert "_skipkv_cuda.so was not built" in errors
    assert "MiB are more than 1" in errors


def test_a_python_with_everything_is_used_as_it_is(tmp_path):
    assert environment.interpreter(tmp_path) == sys.executable


def test_missing_modules_without_wheels_are_reported_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "NEEDED", ("torch", "not_to_be_had"))
    with pytest.raises(RuntimeError, match=r"lacks not_to_be_had.*gpu_check.sh prepare"):
        environment.interpreter(tmp_path)


def test_carried_wheels_are_installed_before_the_packages_of_the_machine(tmp_path, monkeypatch):
    """The machine's Python may be that of a virtual environment, as here."""
    monkeypatch.setattr(environment, "NEEDED", ("carried_alone", "torch"))
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/carried_alone-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_alone.py", "value = 7\n")
        info = "carried_alone-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-alone\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    found = environment.interpreter(tmp_path)
    assert found != sys.executable
    script = "import carried_alone, pydantic; print(carried_alone.value)"
    done = subprocess.run([found, "-c", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


def test_the_machine_is_described(tmp_path):
    found = environment.describe(sys.executable, tmp_path)
    assert {"python", "torch", "triton", "commit", "prepared", "cores", "nvcc"} <= found.keys()
    assert found["commit"] == environment.commit()
