"""Messages about traces."""

from __future__ import annotations

import logging

import pytest

from skipkv_vllm.core import auxiliary


@pytest.fixture
def errors(caplog, monkeypatch):
    """Return the messages logged so far in this test."""
    monkeypatch.setattr(auxiliary, "_reported", {})
    caplog.set_level(logging.ERROR, logger="vllm.skipkv")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vllm.skipkv"]
