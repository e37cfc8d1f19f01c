"""The choice of a backend for an operator, and the reports of faster ones that are missing."""

from __future__ import annotations

import logging

import pytest
import torch

from skipkv_vllm import cli
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import dispatch, native, torch_backend, triton_backend
from skipkv_vllm.ops.paging import Layout
from skipkv_vllm.ops.schema import FAKES, NATIVE, SCHEMAS
from tests.operators.cases import MeasureCase, Pages


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Choices are cached for the process; these tests must neither see nor leave any."""
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda device_type: "it was not built; run `make build`")


def test_every_operator_has_a_schema_a_fake_twin_and_a_definition():
    assert SCHEMAS.keys() == FAKES.keys()
    for op in SCHEMAS:
        assert callable(getattr(torch_backend, op))
        assert getattr(torch.ops.skipkv, op).default.name() == f"skipkv::{op}"


def test_pytorch_is_the_fallback_and_reports_what_was_missed(not_built):
    choice = dispatch.choose("score_tokens", "cpu")
    assert choice.function is torch_backend.score_tokens
    assert choice.missed == ("native: it was not built; run `make build`",)


def test_a_slow_backend_is_a_warning_with_the_remedy(not_built, caplog):
    with caplog.at_level(logging.WARNING, logger="vllm.skipkv"):
        dispatch.warn_if_slow("cpu")
    (record,) = caplog.records
    assert "score_tokens" in record.getMessage()
    assert "run `make build`" in record.getMessage()


def test_fast_backends_are_no_warning(caplog):
    if native.unavailable("cpu"):
        pytest.skip(f"the C++ operators: {native.unavailable('cpu')}")
    with caplog.at_level(logging.WARNING, logger="vllm.skipkv"):
        dispatch.warn_if_slow("cpu")
        dispatch.warn_if_slow("cpu", operators=SCHEMAS)
    assert not caplog.records
    found = dispatch.report("cpu")
    assert all(choice.backend == ("native" if op in NATIVE else "torch") for op, choice in found.items())


def test_operators_that_only_triton_has(with_gpu, monkeypatch, caplog):
    # Even if another backend is forced, which lacks them.
    for forced in (None, "native"):
        dispatch.choose.cache_clear()
        if forced:
            monkeypatch.setenv(dispatch.OVERRIDE, forced)
        found = dispatch.report("cuda")
        assert {op for op, choice in found.items() if choice.backend == "triton"} == SCHEMAS.keys() - NATIVE
        assert all(not choice.missed for choice in found.values())
    monkeypatch.delenv(dispatch.OVERRIDE)
    dispatch.choose.cache_clear()
    monkeypatch.setattr(triton_backend, "unavailable", lambda device_type: "Triton is not installed")
    with caplog.at_level(logging.WARNING, logger="vllm.skipkv"):
        dispatch.warn_if_slow("cuda")
        assert not caplog.records
        dispatch.warn_if_slow("cuda", operators=["store_tokens"])
    assert "store_tokens run in PyTorch, which is slow. triton: Triton is not installed" in caplog.text


def test_a_backend_can_be_forced(monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "torch")
    assert dispatch.choose("select_keep", "cpu").function is torch_backend.select_keep


def test_a_backend_that_cannot_run_is_refused(monkeypatch, not_built):
    monkeypatch.setenv(dispatch.OVERRIDE, "native")
    with pytest.raises(KVPolicyError, match=r"SKIPKV_OPS='native' cannot run select_keep on cpu.*make build.*unset"):
        dispatch.choose("select_keep", "cpu")


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "fast")
    with pytest.raises(KVPolicyError, match=r"SKIPKV_OPS='fast'.*native, triton, torch"):
        dispatch.choose("select_keep", "cpu")


READERS = {op for op, schema in SCHEMAS.items() if "int layout" in schema and op in NATIVE}


@pytest.fixture
def with_gpu(monkeypatch):
    """Let the libraries of GPUs be there, as far as the choice of a backend can see."""
    for module in (native, triton_backend):
        monkeypatch.setattr(module, "unavailable", lambda device_type: None)
    monkeypatch.setattr(native, "operator", lambda op, device_type: op)


def of_native(found):
    """Leave out the operators that the libraries in C++ and CUDA lack."""
    return {op: choice for op, choice in found.items() if op in NATIVE}


def test_latents_on_gpus_are_read_by_triton(with_gpu):
    assert len(READERS) == 6
    found = of_native(dispatch.report("cuda", Layout.LATENT))
    by_triton = {op for op, choice in found.items() if choice.backend == "triton"}
    assert by_triton == READERS - {"compact_pages"}
    assert {choice.backend for op, choice in found.items() if op not in by_triton} == {"native"}
    assert found["score_tokens"].missed == ("native: its kernels for GPUs do not read latents (MLA)",)
    for others in (dispatch.report("cuda"), dispatch.report("cpu", Layout.LATENT)):
        assert {choice.backend for choice in of_native(others).values()} == {"native"}


def test_latents_on_gpus_without_triton_are_slow(with_gpu, monkeypatch, caplog):
    monkeypatch.setattr(triton_backend, "unavailable", lambda device_type: "Triton is not installed")
    with caplog.at_level(logging.WARNING, logger="vllm.skipkv"):
        dispatch.warn_if_slow("cuda")
        assert not caplog.records
        dispatch.warn_if_slow("cuda", Layout.LATENT)
    (record,) = caplog.records
    assert "score_tokens" in record.getMessage()
    assert "Triton is not installed" in record.getMessage()
    assert "compact_pages" not in record.getMessage()


def test_a_forced_backend_that_cannot_read_latents_is_refused(with_gpu, monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "native")
    assert dispatch.function("score_tokens", torch.device("cuda")) == "score_tokens"
    with pytest.raises(KVPolicyError, match=r"SKIPKV_OPS='native' cannot run score_tokens on cuda: .*latents"):
        dispatch.function("score_tokens", torch.device("cuda"), Layout.LATENT)


@pytest.mark.parametrize("layout", Layout)
def test_a_call_by_name_chooses_by_the_layout_of_the_pages(layout, monkeypatch):
    seen = []

    def unavailable(backend, op, device_type, layout):
        seen.append((op, device_type, layout))
        return None if backend == "torch" else "it is not there"

    monkeypatch.setattr(dispatch, "_unavailable", unavailable)
    pages = Pages(layout, heads=1, dim=128)
    arguments = MeasureCase(pages, lengths=(33,), counted=(8,)).build().keys()
    torch.ops.skipkv.key_similarity(*arguments)
    assert set(seen) == {("key_similarity", "cpu", layout)}


def run_doctor(capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    return stop.value.code, capsys.readouterr().out


def test_doctor_lists_the_backend_of_each_operator(capsys, monkeypatch):
    if native.unavailable("cpu"):
        pytest.skip(f"the C++ operators: {native.unavailable('cpu')}")
    code, output = run_doctor(capsys)
    assert code == 0, output
    for op in SCHEMAS:
        assert f"{op:20}{'native' if op in NATIVE else 'torch'}" in output


def test_doctor_names_the_remedy_and_fails(capsys, not_built):
    code, output = run_doctor(capsys)
    assert code == 1
    assert "score_tokens        torch" in output
    assert "! native: it was not built; run `make build`" in output
