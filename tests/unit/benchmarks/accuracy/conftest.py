"""A pool of fake workers."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import run
from tests.unit.benchmarks.accuracy.fakes import FakePool


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(run, "Pool", FakePool)
    monkeypatch.setattr(FakePool, "asked", [])
    monkeypatch.setattr(FakePool, "stop_after", 10**9)
    monkeypatch.setattr(FakePool, "compactions", 2)
    return FakePool
