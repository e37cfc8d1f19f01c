"""The declarations of the operators: one schema each, from which the fakes, the backends and the C++ side follow."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from skipkv_vllm.ops import Effect, schema, torch_backend, triton_backend
from tests.operators.cases import CompactCase, MeasureCase, ScoreCase
from tests.operators.measured_cases import CentralCase, NormsCase, PoolCase
from tests.operators.triton_calls import RECALLING

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that writes the C++ header."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "csrc/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_reads_every_schema(generate):
    native = {op: signature for op, signature in schema.SCHEMAS.items() if op in schema.NATIVE}
    assert generate.read_schemas(generate.SCHEMAS.read_text()) == native
    assert {op for op in schema.SCHEMAS if op not in native} == {f.__name__ for f in RECALLING}


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("(Tensor(a!)[] caches, int layout) -> ()", "void op(const std::vector<Tensor>& caches, int64_t layout);"),
        ("(Tensor? x, float mix) -> Tensor", "Tensor op(const std::optional<Tensor>& x, double mix);"),
        ("(Tensor(b!) x, bool y) -> (Tensor a, Tensor b)", "std::tuple<Tensor, Tensor> op(const Tensor& x, bool y);"),
    ],
)
def test_declarations_in_cpp(generate, signature, expected):
    assert generate.declaration("op", signature) == expected


def test_the_header_lists_every_operator(generate):
    text = generate.header({"first": "(Tensor x) -> Tensor", "second": "(Tensor(a!) x) -> ()"})
    assert "\nTensor first(const Tensor& x);\nvoid second(const Tensor& x);\n" in text
    assert text.endswith('  X(first, "(Tensor x) -> Tensor") \\\n  X(second, "(Tensor(a!) x) -> ()")\n')


@pytest.mark.parametrize("op", schema.SCHEMAS)
@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_backends_have_the_signature_of_the_schema(backend, op):
    declared = torch._C.parse_schema(f"skipkv::{op}{schema.SCHEMAS[op]}")
    types = {"List[Tensor]": "list[Tensor]", "Optional[Tensor]": "Tensor | None"}
    expected = {argument.name: types.get(str(argument.type), str(argument.type)) for argument in declared.arguments}
    results = {0: "None", 1: "Tensor"}.get(len(declared.returns), "tuple[Tensor, Tensor, Tensor]")
    signature = inspect.signature(getattr(backend, op))
    assert {name: parameter.annotation for name, parameter in signature.parameters.items()} == expected
    assert signature.return_annotation == results


def results() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator that returns something."""
    score, measure, compact = ScoreCase().build(), MeasureCase().build(), CompactCase().build()
    requests, layers, heads, _ = score.positions.shape
    lengths = score.num_resident
    sidecar = torch.zeros(layers, 9, heads, 16, dtype=torch.int32)
    sentences = (torch.full((3, 5), 2**31 - 1, dtype=torch.int32), torch.zeros(3, 5), torch.zeros(3).long())
    steering = (torch.zeros(4).float(), torch.zeros(4).int(), torch.zeros(2, 8))
    return {
        "score_tokens": score,
        "measure_attention": (*measure, Effect.OUTPUT, 0.0),
        "key_similarity": measure.keys(),
        "vector_norms": NormsCase().build(),
        "pool_neighbours": PoolCase().build(),
        "central_tokens": CentralCase().build(),
        "select_keep": (
            *(score.positions.float(), score.positions, lengths, lengths // 2, lengths * 0, lengths * 0 + 2**30),
            int(lengths.max()),
        ),
        "held_positions": (sidecar, compact.source_table[:1] * 0, lengths[:1] * 0, lengths[:1] * 0, 20),
        "key_moments": (*score[:4], lengths * 0, lengths),
        "stored_attention": (
            *(torch.zeros(3, layers, heads, 64, 2, dtype=torch.uint8), torch.zeros(3, layers, heads, 64)),
            *(torch.zeros(requests, 1).int(), torch.ones(requests).int()),
            *(torch.zeros(requests, layers, 4, 2 * heads, 16), 30),
        ),
        "token_penalties": (*sentences, torch.zeros(requests).long(), score.positions),
        "steer_add": (torch.zeros(4, 8, dtype=torch.bfloat16), *steering),
    }


def test_fakes_have_the_shapes_and_dtypes_of_the_results():
    cases = results()
    assert cases.keys() == {op for op, signature in schema.SCHEMAS.items() if not signature.endswith("()")}
    for op, arguments in cases.items():
        real, fake = getattr(torch_backend, op)(*arguments), schema.FAKES[op](*arguments)
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for expected, got in pairs:
            assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device), op


def test_fakes_of_operators_without_a_result_return_none():
    for op, signature in schema.SCHEMAS.items():
        if signature.endswith("()"):
            assert schema.FAKES[op]() is None
