"""Files of traces: their names, their folder and their content."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.trace.files import Trace, trace_path
from skipkv_vllm.trace.writer import TraceWriter
from tests.unit.trace.parts import compact_once, finish, make_collector


def test_save_and_load_by_hand(tmp_path):
    trace = Trace(
        prompt_token_ids=torch.tensor([1, 2]),
        output_token_ids=torch.tensor([3]),
        logical_length=torch.tensor([9]),
        resident_before=torch.tensor([8]),
        kept=[torch.tensor([[[0, 5]]], dtype=torch.int32)],
        life=torch.tensor([0]),
        sentences=torch.tensor([[0, 2]]),
        similar_pairs=torch.zeros(0, 2, dtype=torch.int64),
        similarity=torch.zeros(0),
        parameters={"nested": {"list": [1, "two"]}, "none": None},
    )
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(str(tmp_path / "t.safetensors"))
    for name, value in trace._asdict().items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(loaded, name), value)
    assert torch.equal(loaded.kept[0], trace.kept[0])
    assert loaded.parameters == trace.parameters
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"], "an unfinished file was left behind"


def test_an_unwritable_folder_is_refused_at_start(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(KVPolicyError, match=r"kv_trace_dir='.*below' cannot be written \(.*\); name a writable folder"):
        make_collector(file / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_start(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(KVPolicyError, match="cannot be written"):
        make_collector(tmp_path)


def test_request_ids_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "traces"
    path = finish(make_collector(folder), "../../etc/x y", [1], [2])
    assert path.parent == folder
    assert Trace.load(path).parameters["request_id"] == "../../etc/x y"


@pytest.mark.parametrize("request_id", ["..", "."])
def test_a_request_named_like_a_folder_removes_nothing_else(tmp_path, request_id):
    folder = tmp_path / "traces"
    collector = make_collector(folder)
    other = folder / "other.safetensors"
    other.write_text("kept")
    (folder / ".parts" / "running").mkdir()
    path = finish(collector, request_id, [1], [2])
    assert path.exists(), "the trace itself was removed"
    assert other.exists(), "another request's trace was removed"
    assert (folder / ".parts" / "running").exists(), "another request's parts were removed"


def test_ids_that_differ_only_in_odd_characters_do_not_share_a_file(tmp_path):
    collector = make_collector(tmp_path)
    assert finish(collector, "a/b", [1], [2]) != finish(collector, "a_b", [1], [2])


LONG_IDS = [
    "r" * 230,
    "r" * 300,
    "r" * 299 + "s",
    "é" * 150,
    "思" * 100,
    "." * 90,
    "a" * 128,
    "a" * 129,
    "\ud800",
    "%" * 70,
]


@pytest.mark.parametrize("request_id", LONG_IDS, ids=range(len(LONG_IDS)))
def test_an_id_of_any_length_and_alphabet_has_a_file(tmp_path, request_id):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    compact_once(collector, writer, request_id)
    path = finish(collector, request_id, [1], [2])
    assert len(path.name.encode()) <= 143
    trace = Trace.load(path)
    assert len(trace.kept) == 1
    assert trace.parameters["request_id"] == request_id, "the whole id must be readable"


def test_no_two_ids_share_a_file(tmp_path):
    cut = trace_path(tmp_path, "r" * 300).stem
    ids = [*LONG_IDS, "", "%", cut, cut.replace("+", "%2B"), "R" * 300, "r" * 1000]
    for one, other in itertools.combinations(ids, 2):
        assert trace_path(tmp_path, one) != trace_path(tmp_path, other)
