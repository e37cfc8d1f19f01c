"""Triton's compiler accepts the kernels that read keys, which its interpreter cannot show; no GPU is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from skipkv_vllm.ops import Effect
from tests.operators.backends import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("an interpreting Triton does not compile", allow_module_level=True)
tl = pytest.importorskip("triton.language")

FLOATS = (
    *("top", "share", "squares", "outputs", "out", "inverse", "partial", "logits"),
    *("weights", "centroids", "distance", "scores"),
)
NUMBERS = (
    *("first", "n", "layers", "heads", "table_stride", "page_stride", "head_stride", "token_stride"),
    *("page_size", "dim", "window", "group", "block", "dims", "tile", "windows", "part", "segments", "longest"),
    "rows_per_request",
)
ELEMENTS = {"fp32": "fp32", "bf16": "bf16", "float8e4nv": "fp32", "float8e5": "fp32"}
"""Type of the queries by type of the cache."""


def signature(kernel: Any, element: str) -> dict[str, str]:
    known = {"pointers": "*i64", "root": "fp32", "queries": f"*{ELEMENTS[element]}", "tie": "fp32"}
    known |= {"log_negligible": "fp32"}
    known |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(NUMBERS, "i32")
    return {
        p.name: "constexpr" if p.is_constexpr else known.get(p.name, "*i32")  # tables, positions and lengths
        for p in kernel.params
    }


KERNELS = (
    *("scoring.measure_keys", "measuring.measure_vectors", "measuring.choose_central"),
    *(f"attention.{k}_queries" for k in ("attend", "sum")),
)
OTHERS = [
    ("measuring.pool_ranks", Effect.ATTENTION),
    ("attention.attend_queries", Effect.SEEN),
    *(("attention.sum_queries", effect) for effect in Effect if effect is not Effect.JOINT),
]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_an_older_gpu(name, element):
    check_compiles(name, element, Effect.JOINT)


@pytest.mark.parametrize(("name", "effect"), OTHERS)
def test_compiles_for_every_effect(name, effect):
    check_compiles(name, "bf16", effect)


def check_compiles(name: str, element: str, effect: Effect) -> None:
    from triton.backends.compiler import GPUTarget

    module, _, name = name.partition(".")
    kernel = getattr(import_module(f"skipkv_vllm.ops.triton_kernels.{module}"), name)
    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "float8e4nv": tl.float8e4nv, "float8e5": tl.float8e5}
    values = {"page_size": 16, "dim": 80, "window": 32, "group": 4, "effect": int(effect), "block": 64, "dims": 128}
    values |= {
        "valued": Effect.OUTPUT <= effect <= Effect.JOINT,
        "skip": 80,
        "norm": 2,
        "pool": 7,
        "most": 64,
        "rounds": 5,
    }
    values |= {"errors": values["valued"] and effect is not Effect.VALUE}
    values |= dict.fromkeys(("centred", "ordered", "weighted"), True) | ({"block": 32} if "central" in name else {})
    values |= {"tile": 16, "windows": 32, "element": types[element], "multiply": types[ELEMENTS[element]]}
    kinds = signature(kernel, element)
    constants = {(i,): values[name] for i, (name, kind) in enumerate(kinds.items()) if kind == "constexpr"}
    source = triton.compiler.ASTSource(kernel, kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    # Shared memory of a block on the smallest GPUs of the last three generations.
    assert compiled.metadata.shared <= 99 * 1024
