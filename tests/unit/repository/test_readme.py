"""The README and the generated pages of the documentation agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skipkv_vllm.config import KVPolicyConfig, flags
from skipkv_vllm.integration import metrics_page
from skipkv_vllm.policies import make_policy, policy_names, table
from tests import families_page
from tests.random_models import FAMILIES

REPOSITORY = Path(__file__).parents[3]
README = (REPOSITORY / "README.md").read_text()
PAGES = REPOSITORY / "docs" / "reference"


def test_the_flags_table_is_the_generated_one():
    assert (PAGES / "flags.md").read_text() == flags.document(), (
        "run `python -m skipkv_vllm.config.flags > docs/reference/flags.md`"
    )


def test_the_table_of_policies_is_the_generated_one():
    assert (PAGES / "methods.md").read_text() == table.document(), (
        "run `python -m skipkv_vllm.policies.table > docs/reference/methods.md`"
    )
    assert "?" not in table.document(), "a policy does not state its cost"


def test_the_table_of_metrics_is_the_generated_one():
    assert (PAGES / "metrics.md").read_text() == metrics_page.document(), (
        "run `python -m skipkv_vllm.integration.metrics_page > docs/reference/metrics.md`"
    )


def test_the_table_of_families_is_the_generated_one():
    assert families_page.ABOUT.keys() == FAMILIES.keys()
    assert (PAGES / "families.md").read_text() == families_page.document(), (
        "run `python -m tests.families_page > docs/reference/families.md`"
    )


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_named_with_its_paper(name):
    assert f"`{name}`" in README
    paper = make_policy(name).about.arxiv
    assert not paper or re.search(rf"`{name}` \([^)]*\]\(https://arxiv.org/abs/{paper}\)", README)


def test_the_flags_of_the_readme_have_their_defaults():
    rows = re.findall(r"^\| `--(?:\[no-\])?(kv-[a-z0-9-]+)` \| `(\w+)` \|", README, re.MULTILINE)
    assert len(rows) == 6
    for flag, default in rows:
        value = KVPolicyConfig.model_fields[flag.replace("-", "_")].get_default(call_default_factory=True)
        assert {"True": "on", "{}": "none"}.get(str(value), str(value)) == default


def test_the_readme_is_short():
    assert len(README.encode()) <= 7168
