"""Which rooms of the package import vLLM, and which import which."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.rooms import ROOT, SHARED, arrows, build, leading_back

MOST_ARROWS = 53
"""without those to `core`, which every room may import"""


def test_the_contracts_of_pyproject_are_kept():
    # In a process of its own, because it configures logging and so disables the loggers there are.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_few_arrows_and_none_leads_back():
    found = arrows(build(ROOT))
    assert not leading_back(found)
    assert sum(end not in SHARED for _, end in found) <= MOST_ARROWS


@pytest.mark.parametrize(
    ("found", "back"),
    [
        ([("a", "b"), ("b", "c"), ("a", "c")], set()),
        # Without the second arrow there is no loop; any other choice takes two.
        ([("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")], {("a", "b")}),
        ([("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")], {("a", "b"), ("c", "d")}),
    ],
)
def test_as_few_arrows_as_possible_lead_back(found, back):
    smallest = leading_back(found)
    assert len(smallest) == len(back)
    assert not leading_back(set(found) - smallest)
