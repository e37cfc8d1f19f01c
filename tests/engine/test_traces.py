"""Traces of a running engine: requests are answered whatever their ids are and whatever the storage does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from vllm import SamplingParams

from skipkv_vllm.trace import collector as trace_collector
from skipkv_vllm.trace import files as trace_files
from skipkv_vllm.trace.files import Trace, trace_path
from tests import harness


def answer(llm, request_id: str) -> str:
    """Compact a request at least once; returns the engine's id of it."""
    params = SamplingParams(temperature=0.0, max_tokens=220, ignore_eos=True, extra_args={"kv_budget": 96})
    (prompt,) = harness.demo_prompts(1)
    internal = llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    output = None
    while llm.llm_engine.has_unfinished_requests():
        (output,) = llm.llm_engine.step() or (output,)
    assert output.request_id == request_id
    assert len(output.outputs[0].token_ids) == 220
    assert output.kv_transfer_params["skipkv"]["compactions"] >= 1
    return internal


@pytest.mark.parametrize("request_id", ["r" * 230, "r" * 300, "思" * 200, "../" * 40])
def test_a_long_request_id_is_answered_and_traced(request_id):
    llm = harness.engine()
    internal = answer(llm, request_id)
    assert harness.collector_of(llm).flush()
    trace = Trace.load(trace_path(harness.trace_folder(), internal))
    assert len(trace.kept) >= 1
    assert trace.parameters["request_id"] == internal
    assert request_id in internal


def fail(*_args, **_options):
    raise SafetensorError("I/O error: File too large (os error 27)")


def test_requests_are_answered_while_no_trace_can_be_written(monkeypatch):
    llm, folder = harness.engine(), Path(harness.trace_folder())
    collector = harness.collector_of(llm)
    monkeypatch.setattr(trace_collector, "WAIT_SECONDS", 0.2)
    collector.take_dropped()

    with monkeypatch.context() as patch:
        patch.setattr(trace_files, "save_file", fail)
        answer(llm, "full disk")
        assert collector.flush()
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    answer(llm, "no folder")
    assert collector.flush()
    folder.unlink()
    internal = answer(llm, "a folder again")
    assert collector.flush()

    assert Trace.load(trace_path(folder, internal)).kept
    assert collector.take_dropped() == {"missing_part": 2}
