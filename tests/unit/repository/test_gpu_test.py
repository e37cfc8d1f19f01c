"""`scripts/gpu_test.sh` with fake parts: order, time limits, results, exit status; and whether its real parts exist."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.kernels import __main__ as kernels
from benchmarks.overhead import __main__ as overhead
from tests.harness import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "gpu_test.py"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_test", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_test"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


script = load()


def fake(name: str, code: str, limit: float = 60, **more: Any) -> Any:
    return script.Part(name, "?", ("-c", code), limit, **more)


def file_of_tests(name: str, code: str, folder: Path, **more: Any) -> Any:
    """Return a part that runs a file of tests."""
    path = folder / f"test_{name}.py"
    path.write_text(f"import pytest\n{code}\n")
    words = script.pytest("-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(path))
    return script.Part(name, "?", words, 60, **more)


def run(folder: Path, *chosen: Any, words: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    status = script.main(["--out", str(folder), *words], list(chosen))
    return status, json.loads((folder / "results.json").read_text())


def test_later_parts_run_though_an_earlier_one_fails(tmp_path, capfd):
    status, found = run(tmp_path, fake("a", "print('of a'); raise SystemExit(3)"), fake("b", "print('of b')"))
    assert status == 1
    assert [(part["name"], part["status"], part["code"]) for part in found["parts"]] == [
        ("a", "FAILED", 3),
        ("b", "passed", 0),
    ]
    assert found["parts"][0]["tail"] == ["of a"]
    assert (tmp_path / "02-b.log").read_text() == "of b\n"
    assert {"commit", "machine", "versions", "seconds", "started"} <= found["run"].keys()
    said = capfd.readouterr().out
    assert "a: FAILED; all output:" in said
    assert "1 of 2 parts without a failure" in said


def test_a_part_ends_with_its_time_and_its_children_with_it(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(other.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    status, found = run(tmp_path, fake("long", code, 1.5), fake("next", "pass"))
    assert time.monotonic() - started < 30
    assert status == 1
    first, second = found["parts"]
    assert (first["status"], first["code"], first["tail"]) == ("TIMED OUT", None, ["waiting"])
    assert second["status"] == "passed"
    state = Path(f"/proc/{child.read_text()}/stat")
    # Its parent is gone, so whoever adopted it may not have read its end.
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_time_limits_can_be_stretched(tmp_path):
    part = fake("slow", "import time; time.sleep(1)", 0.3)
    assert run(tmp_path, part)[0] == 1
    assert run(tmp_path, part, words=("--patience", "100"))[0] == 0


def test_a_part_whose_tests_are_all_skipped_has_not_passed(tmp_path):
    skipped = "def test_it(): pytest.skip('no GPU')"
    status, found = run(
        tmp_path,
        file_of_tests("optional", skipped, tmp_path),
        file_of_tests("needed", skipped, tmp_path, must_run=True),
        file_of_tests("none", "", tmp_path, must_run=True),
        file_of_tests("some", "def test_it(): pass\n" + skipped.replace("it", "other"), tmp_path, must_run=True),
        file_of_tests("wrong", "def test_it(): assert False\ndef test_other(): pass", tmp_path),
    )
    assert status == 1
    assert [(part["status"], part["counts"]) for part in found["parts"]] == [
        ("skipped", {"skipped": 1}),
        ("NOTHING RAN", {"skipped": 1}),
        ("NOTHING RAN", {}),
        ("passed", {"passed": 1, "skipped": 1}),
        ("FAILED", {"failed": 1, "passed": 1}),
    ]
    assert run(tmp_path, file_of_tests("optional", skipped, tmp_path))[0] == 0


def test_single_parts_can_be_chosen(tmp_path, capsys):
    chosen = (fake("alpha", "pass"), fake("beta", "raise SystemExit(1)"))
    status, found = run(tmp_path, *chosen, words=("--only", "alp"))
    assert (status, [part["name"] for part in found["parts"]]) == (0, ["alpha"])
    assert script.main(["--only", "gamma"], list(chosen)) == 2
    assert "--only 'gamma': no such part" in capsys.readouterr().err
    assert script.main(["--list"], list(chosen)) == 0
    assert "beta (at most 60 s): ?" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_found(tmp_path, monkeypatch):
    real = script.run_part

    def stop_at_second(part: Any, *arguments: Any) -> Any:
        if part.name == "b":
            raise KeyboardInterrupt
        return real(part, *arguments)

    monkeypatch.setattr(script, "run_part", stop_at_second)
    status, found = run(tmp_path, *(fake(name, "pass") for name in "abc"))
    assert status == 130
    assert [part["status"] for part in found["parts"]] == ["passed", "not run", "not run"]


def test_without_a_gpu_the_script_says_so():
    environment = {key: value for key, value in os.environ.items() if key != "SKIPKV_GPU_TESTS"}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    shell = str(SCRIPT.with_suffix(".sh"))
    done = subprocess.run(["bash", shell], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees no GPU" in done.stderr
    # Parts can be listed anywhere.
    done = subprocess.run(["bash", shell, "--list", "--full"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "all engines" in done.stdout


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_real_parts_exist(on_cpu, tmp_path):
    short = script.parts(tmp_path, on_cpu=on_cpu, full=False)
    long = script.parts(tmp_path, on_cpu=on_cpu, full=True)
    assert long[: len(short)] == short
    assert long[-1].limit > 3600 >= max(part.limit for part in short)
    assert len({part.name for part in long}) == len(long)
    # What matters most comes first, and even if each part takes all its time, soon.
    assert [part.name for part in short[:4]] == ["installation", "CUDA operators", "exactness", "served engine"]
    assert sum(part.limit for part in short[:4]) <= 16 * 60
    for part in long:
        for word in part.words:
            if word.startswith("tests/"):
                assert (REPOSITORY / word).exists(), word
        parsers = {"benchmarks.overhead": overhead, "benchmarks.kernels": kernels}
        for name, module in parsers.items():
            if name in part.words:
                parser = module._parser()
                args = parser.parse_args(part.words[2:])
                if module is overhead:
                    overhead._check(args, parser)


def test_the_first_engine_is_one_of_the_matrix():
    """The expressions of the parts select tests, and together all of that engine."""
    environment = {key: value for key, value in os.environ.items() if key != "SKIPKV_GPU_TESTS"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", script.ENGINES]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    every = [line for line in done.stdout.splitlines() if "::" in line]

    def selected(expression: str) -> list[str]:
        words = [word.removeprefix("not ") for word in expression.split(" and ")]
        wanted = [not word.startswith("not ") for word in expression.split(" and ")]
        return [test for test in every if [word in test for word in words] == wanted]

    parts = {part.name: part for part in script.parts(Path(), on_cpu=False, full=False)}
    chosen = (parts[name].words for name in ("exactness", "other properties of that engine"))
    exact, others = (selected(words[words.index("-k") + 1]) for words in chosen)
    assert len(exact) == 1
    assert sorted(exact + others) == sorted(selected(script.FIRST))
    assert len(others) >= 5
