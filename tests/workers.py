"""Workers of pytest-xdist: how many there are, which tests stay together, and in which order they are handed out.

An engine takes seconds to start and `tests/harness` keeps one for each process, so the tests of a file stay in one
worker. Long files go first, so that all workers end at about the same time.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

MOST = 8
"""More workers end no earlier: they wait for the longest file."""
GIB_PER_WORKER = 5
"""Memory of a worker, its engine of up to four ranks and the references that it compares with."""
FOLDERS = ("engine", "regression", "gpu", "unit")
"""Folders of `tests` by how long their files take."""
LONGEST = (
    "engine/test_parallel.py",
    "engine/test_exactness.py",
    "engine/test_speculation.py",
    "engine/test_families.py",
    "regression/test_load.py",
    "engine/test_gates.py",
    "engine/test_steering.py",
    "engine/test_combinations.py",
    "engine/test_prompt_methods.py",
    "engine/test_server.py",
    "engine/test_patched_vllm.py",
    "regression/test_peer_bugs.py",
)
"""Files of `tests` that take a minute and more, longest first."""


def set_environment() -> None:
    """Give a worker one thread; call before torch and vLLM are imported."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # By default vLLM would bind the engines of all workers to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def num_workers() -> int:
    """Return how many workers this machine's cores and memory allow; 0 for none, all tests in one process."""
    if not version("vllm").endswith("+cpu"):
        return 0  # an engine takes all memory of a GPU
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = min(cores, int(gibibytes / GIB_PER_WORKER), MOST)
    return found if found > 1 else 0


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return an xdist scheduler that hands out whole files, in the order of the tests; None if another one is named.

    `--dist worksteal` suits tests that share no engine, such as those of operators.
    """
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") == "worksteal":
        return None

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def order(item: pytest.Item) -> tuple[int, int]:
    """Return a sort key that puts long files first; tests of a file keep their order."""
    file = item.nodeid.partition("::")[0].removeprefix("tests/")
    folder = file.partition("/")[0]
    return (
        LONGEST.index(file) if file in LONGEST else len(LONGEST),
        FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS),
    )
