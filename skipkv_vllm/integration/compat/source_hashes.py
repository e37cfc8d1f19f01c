"""Signatures and hashes of vLLM's classes and functions, read from its files as text without importing them."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from pathlib import Path
from typing import NamedTuple

PACKAGE = "vllm"


class Symbol(NamedTuple):
    """A class or function as its file defines it.

    Attributes:
        signature: parameters of a function, or bases of a class.
        digest: hash of the source with decorators; indentation and trailing blanks are ignored.
    """

    signature: str
    digest: str


def digest(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split(name: str) -> tuple[str, str]:
    """Split a symbol's name into file and path: `vllm.a.b:Class.method` is `Class.method` of `a/b.py`."""
    module, _, path = name.partition(":")
    return f"{module.removeprefix(f'{PACKAGE}.').replace('.', '/')}.py", path


def read(root: Path, file: str) -> str | None:
    """Return the text of a file of the package, or None if it does not exist."""
    path = root / file
    return path.read_text(encoding="utf-8") if path.is_file() else None


def symbols(text: str) -> dict[str, Symbol]:
    """Return the classes, functions and methods that a file defines at its top level, by path (`Class.method`)."""
    lines = text.splitlines()
    found: dict[str, Symbol] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            source = "\n".join(line.rstrip() for line in source.splitlines())
            if isinstance(node, ast.ClassDef):
                signature = ", ".join(ast.unparse(base) for base in node.bases)
                visit(node.body, f"{prefix}{node.name}.")
            else:
                signature = ast.unparse(node.args)
            found[prefix + node.name] = Symbol(f"({signature})", digest(source))

    visit(ast.parse(text).body, "")
    return found
