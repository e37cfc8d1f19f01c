"""No file and no function is too long to be read in one go, and unit tests lie where their module lies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "skipkv_vllm"
TESTS = Path(__file__).parents[2]
KERNELS = PACKAGE / "ops" / "triton_kernels"
"""left out, as a kernel is one function by nature"""
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of each function in a file, without decorators.

    The parameters of a command count for nothing: they declare its command-line options.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            is_command = "typer." in ast.unparse(node.args)
            yield node.name, node.end_lineno - (node.body[0].lineno if is_command else node.lineno) + 1


def test_no_file_is_too_long():
    sizes = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


def test_no_function_is_too_long():
    sizes = {
        f"{path.relative_to(PACKAGE)}: {name}": size
        for path in PACKAGE.rglob("*.py")
        if KERNELS not in path.parents
        for name, size in functions(path)
    }
    assert len(sizes) > 500
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


def test_no_test_file_is_too_long():
    sizes = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


def test_unit_tests_mirror_the_package():
    folders = {path.parent.relative_to(TESTS / "unit") for path in (TESTS / "unit").rglob("test_*.py")}
    packages = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")}
    others = {folder for folder in folders - packages if folder.parts[0] not in ("benchmarks", "repository")}
    assert others == set()
