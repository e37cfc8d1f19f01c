"""The tests share the machine: as many workers as it has room for, and long files first."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import workers


@pytest.mark.parametrize(
    ("build", "cores", "gibibytes", "found"),
    [
        ("0.32.0+cpu", 2, 16, 2),
        ("0.32.0+cpu", 64, 256, workers.MOST),
        ("0.32.0+cpu", 16, 17, 3),
        ("0.32.0+cpu", 1, 64, 0),
        ("0.32.0+cpu", 2, 8, 0),
        ("0.32.0", 16, 256, 0),
    ],
)
def test_workers_follow_from_cores_memory_and_gpus(build, cores, gibibytes, found, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes * 2**18}
    monkeypatch.setattr(workers, "version", lambda _: build)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert workers.num_workers() == found


def test_long_files_go_first_and_others_by_folder():
    assert all((Path(workers.__file__).parent / file).is_file() for file in workers.LONGEST)
    files = ["unit/core/test_a.py", "engine/test_b.py", *reversed(workers.LONGEST)]
    items = [SimpleNamespace(nodeid=f"tests/{file}::test[a/b]") for file in files]
    found = [item.nodeid.removeprefix("tests/").partition("::")[0] for item in sorted(items, key=workers.order)]
    assert found == [*workers.LONGEST, "engine/test_b.py", "unit/core/test_a.py"]


def test_only_a_worker_runs_on_one_thread(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    workers.set_environment()
    assert os.environ == {}
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"
    workers.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
