"""A model in training."""

from __future__ import annotations

import pytest

from skipkv_vllm.training.student import Student
from tests.unit.training.models import random_model


@pytest.fixture
def student() -> Student:
    return Student(random_model(), width=8, bias=5.0)
