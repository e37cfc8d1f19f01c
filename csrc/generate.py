"""Write `operators.h`: the C++ declaration of every operator, and the list that both libraries register.

    python csrc/generate.py OUTPUT

The schemas come from `skipkv_vllm/ops/schema.py`. That file is parsed rather than imported, because it needs PyTorch
and pip hides PyTorch from isolated builds.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

SCHEMAS = Path(__file__).parents[1] / "skipkv_vllm/ops/schema.py"

ARGUMENTS = {
    "Tensor": "const Tensor&",
    "Tensor?": "const std::optional<Tensor>&",
    "Tensor[]": "const std::vector<Tensor>&",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
}
"""Type of an argument in a schema -> its type in C++."""

HEADER = """\
// Written by csrc/generate.py from skipkv_vllm/ops/schema.py; skipkv_vllm/ops/torch_backend defines the operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace skipkv {{

using torch::stable::Tensor;

{declarations}

}}  // namespace skipkv

// Calls a macro with the name and the schema of each operator.
#define SKIPKV_OPERATORS(X) \\
{entries}
"""


def read_schemas(source: str) -> dict[str, str]:
    """Find the functions decorated with `@operator(schema)`, without those that are not native.

    Args:
        source: text of a Python module.

    Returns:
        Name of each operator -> its schema.
    """
    return {
        function.name: ast.literal_eval(decorator.args[0])
        for function in ast.parse(source).body
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call)
        and getattr(decorator.func, "id", None) == "operator"
        and not decorator.keywords
    }


def declaration(name: str, schema: str) -> str:
    """Translate a schema into a C++ declaration."""
    arguments, result = re.sub(r"\(\w!\)", "", schema).split(" -> ")
    parameters = [part.split() for part in arguments.strip("()").split(",")]
    tensors = ["Tensor"] * result.count("Tensor")
    returned = f"std::tuple<{', '.join(tensors)}>" if len(tensors) > 1 else tensors[0] if tensors else "void"
    return f"{returned} {name}({', '.join(f'{ARGUMENTS[kind]} {argument}' for kind, argument in parameters)});"


def header(schemas: dict[str, str]) -> str:
    """Return the text of `operators.h`."""
    return HEADER.format(
        declarations="\n".join(declaration(name, schema) for name, schema in schemas.items()),
        entries=" \\\n".join(f'  X({name}, "{schema}")' for name, schema in schemas.items()),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header(read_schemas(SCHEMAS.read_text(encoding="utf-8"))), encoding="utf-8")
