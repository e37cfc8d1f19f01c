"""Shared by all tests: the environment, and the fixtures of the engine tests. It imports nothing slow."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests import workers

workers.set_environment()
# Read when vLLM is imported. Engines run in the test's process, so that tests can look at their schedulers.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache


def pytest_report_header() -> str:
    """Say which vLLM is tested; tests of operators need none."""
    try:
        return f"vLLM: {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        return "vLLM: not installed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a command run what takes too long for every change."""
    parser.addoption(
        "--every-mode", action="store_true", help="speculative decoding: all modes, on Runner V2 with long texts"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer `-n auto`."""
    return workers.num_workers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep together what shares an engine."""
    return workers.scheduler(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long groups first where workers share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=workers.order)


@pytest.fixture(scope="session")
def references() -> ReferenceCache:
    """Results of the oracle, computed once per session."""
    from tests.harness import MODEL
    from tests.reference.model import Model
    from tests.reference.references import ReferenceCache

    return ReferenceCache(Model(MODEL))


@pytest.fixture
def one_thread_a_worker() -> Iterator[None]:
    """Let the workers of an engine share the cores of a small machine: one thread each."""
    from tests import harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray's actors and spawned workers import the tests' own classes.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(harness.REPOSITORY), os.getenv("PYTHONPATH")])))
        yield
        harness.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _stop_engine() -> Iterator[None]:
    """Stop the last engine."""
    yield
    if "tests.harness" in sys.modules:
        sys.modules["tests.harness"].shutdown()
