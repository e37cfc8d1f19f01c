"""Real checkpoints for tests, as downloaded by `make real-models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_models import COMPLETE, FOLDER


def real_model(name: str) -> Path:
    """Return the folder of a converted checkpoint; skip the test where it is missing.

    Args:
        name: one of `benchmarks.real_models.MODELS`.
    """
    folder = FOLDER / name
    if not (folder / COMPLETE).is_file():
        pytest.skip(f"{folder} is missing: run make real-models MODELS={name}")
    return folder
