"""What the README says about flags and parameters is what the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipkv_vllm.config.flags import flags_table
from skipkv_vllm.policies import policy_names
from skipkv_vllm.policies.table import document

README = (Path(__file__).parents[3] / "README.md").read_text()


def test_the_flags_table_is_the_generated_one():
    assert flags_table() in README, "run `python -m skipkv_vllm.config.flags` and paste its output into README.md"


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_named(name):
    assert f"`{name}`" in README


def test_the_table_of_policies_is_the_generated_one():
    written = Path(__file__).parents[3] / "docs/policies.md"
    assert document() == written.read_text(), "run `python -m skipkv_vllm.policies.table > docs/policies.md`"
    assert "?" not in document(), "a policy does not say what it costs"
