"""Signatures and hashes of vLLM's classes and functions, read from its files as text without importing them."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from importlib.resources.abc import Traversable
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


def read(root: Traversable, file: str) -> str | None:
    """Return the text of a file of the package, or None if it does not exist."""
    path = root / file
    return path.read_text(encoding="utf-8") if path.is_file() else None


def symbols(text: str) -> dict[str, Symbol]:
    """Return the classes, functions and methods that a file defines at its top level, by path (`Class.method`)."""
    return {path: Symbol(f"({_signature(node)})", digest(code)) for path, node, code in _definitions(text)}


def source(root: Traversable, file: str, path: str) -> str | None:
    """Return the source of a symbol without indentation, or None if the file does not define it."""
    text = read(root, file)
    return next((code for found, _, code in _definitions(text or "") if found == path), None)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(text: str) -> Iterator[tuple[str, Definition, str]]:
    """Yield path, node and source of each definition of a file."""
    lines = text.splitlines()

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition, str]]:
        for node in body:
            if not isinstance(node, Definition):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            code = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            yield prefix + node.name, node, "\n".join(line.rstrip() for line in code.splitlines())
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{prefix}{node.name}.")

    return visit(ast.parse(text).body, "")


def _signature(node: Definition) -> str:
    return ", ".join(map(ast.unparse, node.bases)) if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
