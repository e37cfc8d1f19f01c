"""Every row of the register has tests that exist and that run without a GPU."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.harness import REPOSITORY
from tests.regression import register
from tests.regression.register import BUGS, ROWS, WEAKNESSES


@functools.cache
def functions(path: str) -> set[str]:
    """Test functions of a file."""
    body = ast.parse((REPOSITORY / path).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    row = ROWS[name]
    assert row.title
    assert row.source
    assert len(set(row.tests)) == len(row.tests)
    for test in row.tests:
        path, _, function = test.partition("::")
        assert function in functions(path), f"{test} does not exist"
    assert not all(test.startswith("tests/gpu/") for test in row.tests), "this row has no test that runs without a GPU"


def test_no_row_is_missing():
    assert list(WEAKNESSES) == [f"W{number}" for number in range(1, 19)]
    assert len(BUGS) == 22
    assert len(ROWS) == len(BUGS) + len(WEAKNESSES) + len(register.DEMANDS)


@pytest.mark.parametrize("file", ["peer_bugs", "weaknesses", "load", "crash"])
def test_every_test_of_this_folder_belongs_to_a_row(file):
    path = f"tests/regression/test_{file}.py"
    named = {test for row in ROWS.values() for test in row.tests}
    assert {f"{path}::{function}" for function in functions(path)} <= named


def test_the_tests_of_a_row_can_be_run(capsys):
    assert register.main(["W7", "stale-grades"]) == 0
    assert capsys.readouterr().out.split() == [*WEAKNESSES["W7"].tests, *BUGS["stale-grades"].tests]
    assert register.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)
    assert register.main(["W77"]) == 2
