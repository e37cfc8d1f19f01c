"""What the README says about flags and parameters is what the code has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from skipkv_vllm.config import flags_table
from skipkv_vllm.policies import make_policy, policy_names

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_flags_table_is_the_generated_one():
    assert flags_table() in README, "run `python -m skipkv_vllm.config` and paste its output into README.md"


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_and_parameter_is_named(name):
    assert f"`{name}`" in README
    for field in fields(make_policy(name)):
        assert f"`{field.name}`" in README
