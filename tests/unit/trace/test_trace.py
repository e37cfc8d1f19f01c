"""Traces: what the workers leave and the scheduler joins comes back as it was."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core import auxiliary
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.orders import Compaction, Started
from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.trace import collector as trace_collector
from skipkv_vllm.trace import files as trace_files
from skipkv_vllm.trace.collector import TraceCollector
from skipkv_vllm.trace.files import Trace, trace_path
from skipkv_vllm.trace.writer import TraceWriter
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens

DOT = 9
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
LAYERS, HEADS = 2, 3


def config_for(folder) -> KVPolicyConfig:
    return KVPolicyConfig(kv_policy="skipkv", kv_budget=16, kv_trace_dir=str(folder))


def make_collector(folder, ranks: int = 1, tables: SentenceTables | None = TABLES, stages: int = 1) -> TraceCollector:
    return TraceCollector(config_for(folder), (stages, ranks), tables, {"model": "m", "kv_budget": 16})


def finish(collector: TraceCollector, request_id: str, *texts: list[int]) -> Path:
    """Write a trace and wait for it."""
    collector.finish(request_id, *texts)
    assert collector.flush()
    return trace_path(collector._folder, request_id)


def order(request_id: str, ordinal: int, logical: int, resident: int, keep: int) -> Compaction:
    return Compaction(request_id, logical, resident, keep, [1, 2], [1], ordinal)


def kept(rank: int, seed: int, keep: int) -> Tensor:
    """Survivors of one rank: ascending positions that differ by layer, head and rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    rows = [torch.randperm(40, generator=generator)[:keep].sort().values for _ in range(LAYERS * HEADS)]
    return torch.stack(rows).view(LAYERS, HEADS, keep)


def similar(slot: int) -> tuple[Tensor, Tensor]:
    """Sentences 0 and 2 are similar, sentence 1 is not."""
    tracker = SentenceTracker(
        TABLES,
        SentenceOptions(0.9, 16),
        num_rows=2,
        max_length=50,
        hidden_size=2,
        vocab_size=10,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tracker.reset(1, 0)
    tracker.update(
        TrackedTokens(
            token_ids=torch.tensor([3, DOT, 4, DOT, 3, DOT]),
            spans=torch.tensor([[1], [0], [6], [0]]),
            num_tokens=6,
            hidden=torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]]),
        )
    )
    return tracker.similar_pairs(slot)


def test_two_ranks_come_back_as_one(tmp_path):
    collector, writers = make_collector(tmp_path, ranks=2), [TraceWriter(str(tmp_path), r) for r in (0, 1)]
    start = Started("chat/1", "skipkv", 4, 4, 4)
    orders = [order("chat/1", 0, 24, 24, 16), order("chat/1", 1, 32, 24, 16)]
    collector.sent([], [start])
    for writer in writers:
        writer.started("chat/1")
    for one in orders:
        collector.sent([one], [])
        for rank, writer in enumerate(writers):
            writer.compacted(one, kept(rank, one.ordinal, 16), similar(1))
    prompt, output = [1, 2, 3, DOT], [5, 6, DOT, DOT, 8, 7, DOT, 5]
    path = finish(collector, "chat/1", prompt, output)

    assert path == tmp_path / "chat%2F1.safetensors"
    trace = Trace.load(path)
    assert trace.prompt_token_ids.tolist() == prompt
    assert trace.output_token_ids.tolist() == output
    assert trace.logical_length.tolist() == [24, 32]
    assert trace.resident_before.tolist() == [24, 24]
    assert trace.life.tolist() == [0, 0]
    assert len(trace.kept) == 2
    for ordinal, rows in enumerate(trace.kept):
        assert rows.dtype == torch.int32
        # A layer's kv heads are those of rank 0 followed by those of rank 1.
        assert torch.equal(rows, torch.cat([kept(0, ordinal, 16), kept(1, ordinal, 16)], dim=1).int())
    # Sentences are tracked from position 4 on; the second delimiter in a row belongs to the first sentence.
    assert trace.sentences.tolist() == [[4, 8], [8, 11]]
    assert trace.similar_pairs.tolist() == [[0, 2]]
    torch.testing.assert_close(trace.similarity, torch.tensor([1.0]))
    assert trace.parameters["model"] == "m"
    assert trace.parameters["kv_budget"] == 16
    assert trace.parameters["request_id"] == "chat/1"
    assert trace.parameters["request_policy"] == "skipkv"


def test_stages_of_a_pipeline_come_back_as_layers(tmp_path):
    collector = make_collector(tmp_path, ranks=2, stages=2)
    collector.sent([], [Started("a", "skipkv", 4, 4, 4)])
    one = order("a", 0, 24, 24, 16)
    collector.sent([one], [])
    for rank in range(4):
        writer = TraceWriter(str(tmp_path), rank)
        writer.started("a")
        # Only the last stage, ranks 2 and 3, tracks sentences.
        writer.compacted(one, kept(rank, 0, 16), similar(1) if rank >= 2 else None)
    trace = Trace.load(finish(collector, "a", [1, 2, 3, DOT], [5, 6]))
    first, last = (torch.cat([kept(rank, 0, 16), kept(rank + 1, 0, 16)], dim=1) for rank in (0, 2))
    assert torch.equal(trace.kept[0], torch.cat([first, last]).int())
    assert trace.similar_pairs.tolist() == [[0, 2]]


def test_parts_are_removed_and_other_requests_are_left_alone(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    for name in ("a", "b"):
        collector.sent([], [Started(name, "rkv", 1, 1, 1)])
        writer.started(name)
        one = order(name, 0, 24, 24, 16)
        collector.sent([one], [])
        writer.compacted(one, kept(0, 0, 16), None)
    finish(collector, "a", [1], [2])
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == ["b"]
    finish(collector, "b", [1], [2])
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == []
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}


def test_many_compactions_keep_their_order(tmp_path):
    # "kept/10" sorts before "kept/2" as text.
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    collector.sent([], [Started("a", "rkv", 1, 1, 1)])
    writer.started("a")
    for i in range(12):
        one = order("a", i, 24 + 8 * i, 24, 16)
        collector.sent([one], [])
        writer.compacted(one, torch.full((LAYERS, HEADS, 16), i), None)
    trace = Trace.load(finish(collector, "a", [1], [2]))
    assert [int(rows[0, 0, 0]) for rows in trace.kept] == list(range(12))


def test_a_preempted_request_has_several_lives(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    seen = []
    for life in range(3):
        collector.sent([], [Started("a", "rkv", 1, 1, 1)])
        writer.started("a")
        for ordinal in range(life):
            # The ordinal restarts in every life; parts must not be confused.
            one = order("a", ordinal, 24 + life, 24, 16)
            collector.sent([one], [])
            writer.compacted(one, torch.full((LAYERS, HEADS, 16), 10 * life + ordinal), None)
            seen.append((life, 10 * life + ordinal))
    trace = Trace.load(finish(collector, "a", [1], [2]))
    assert trace.life.tolist() == [life for life, _ in seen] == [1, 2, 2]
    assert [int(rows[0, 0, 0]) for rows in trace.kept] == [value for _, value in seen]


def test_an_id_that_is_used_again_starts_with_life_0(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    for round_ in range(2):
        collector.sent([], [Started("a", "rkv", 1, 1, 1)])
        writer.started("a")
        one = order("a", 0, 24, 24, 16)
        collector.sent([one], [])
        writer.compacted(one, torch.full((LAYERS, HEADS, 16), round_), None)
        trace = Trace.load(finish(collector, "a", [1], [2]))
        writer.finished(["a"])
        assert trace.life.tolist() == [0]
        assert int(trace.kept[0][0, 0, 0]) == round_


def test_pairs_found_at_any_compaction_are_kept(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    collector.sent([], [Started("a", "skipkv", 0, 0, 0)])
    writer.started("a")
    first, second = order("a", 0, 24, 24, 16), order("a", 1, 32, 24, 16)
    for one in (first, second):
        collector.sent([one], [])
    writer.compacted(first, kept(0, 0, 16), similar(1))
    writer.compacted(second, kept(0, 1, 16), similar(0))  # a slot without sentences
    trace = Trace.load(finish(collector, "a", [1], [2]))
    assert trace.similar_pairs.tolist() == [[0, 2]]


@pytest.mark.parametrize("managed", [True, False])
def test_a_request_that_was_never_compacted(tmp_path, managed):
    collector = make_collector(tmp_path)
    if managed:
        collector.sent([], [Started("a", "rkv", 2, 2, 2)])
    trace = Trace.load(finish(collector, "a", [1, DOT], [3, DOT, 4]))
    assert trace.kept == []
    assert trace.logical_length.shape == trace.life.shape == (0,)
    assert trace.similar_pairs.shape == (0, 2)
    assert trace.sentences.tolist() == ([[2, 4]] if managed else [[0, 2], [2, 4]])
    assert trace.parameters["request_policy"] == ("rkv" if managed else "full")


def test_without_a_tokenizer_there_are_no_sentences(tmp_path):
    trace = Trace.load(finish(make_collector(tmp_path, tables=None), "a", [1, DOT], [3, DOT]))
    assert trace.sentences.shape == (0, 2)


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


def compact_once(collector: TraceCollector, writer: TraceWriter, request_id: str) -> None:
    start, one = Started(request_id, "rkv", 1, 1, 1), order(request_id, 0, 24, 24, 16)
    collector.sent([one] if request_id in collector._logs else [], [start])
    collector.sent([one], [])
    writer.started(request_id)
    writer.compacted(one, kept(0, 0, 16), None)


@pytest.fixture
def errors(caplog, monkeypatch):
    """Return the messages logged so far in this test."""
    monkeypatch.setattr(auxiliary, "_reported", {})
    caplog.set_level(logging.ERROR, logger="vllm.skipkv")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vllm.skipkv"]


def test_a_missing_part_drops_the_trace_and_names_the_file(tmp_path, monkeypatch, errors):
    monkeypatch.setattr(trace_collector, "WAIT_SECONDS", 0.02)
    collector, writer = make_collector(tmp_path, ranks=2), TraceWriter(str(tmp_path), 0)
    compact_once(collector, writer, "a")
    assert not finish(collector, "a", [1], [2]).exists()
    assert collector.take_dropped() == {"missing_part": 1}
    assert collector.take_dropped() == {}, "a trace must be counted once"
    assert "rank1" in errors()[0]
    assert not (tmp_path / ".parts" / "a").exists(), "parts of a dropped trace were left behind"
    # The same id works again.
    collector.sent([], [Started("a", "rkv", 1, 1, 1)])
    assert Trace.load(finish(collector, "a", [1], [2])).kept == []


def full_disk(*_args, **_options):
    # Not an OSError: the exception of safetensors is no subclass of it.
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_part_that_cannot_be_written_drops_the_trace_at_once(tmp_path, monkeypatch, errors):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    with monkeypatch.context() as patch:
        patch.setattr(trace_files, "save_file", full_disk)
        compact_once(collector, writer, "a")
        assert writer.flush()
    started = time.monotonic()
    finish(collector, "a", [1], [2])
    assert time.monotonic() - started < trace_collector.WAIT_SECONDS / 2, (
        "the collector must not wait for a part that will never come"
    )
    assert collector.take_dropped() == {"missing_part": 1}
    assert "No space left" in errors()[0]
    # There is space again.
    writer.finished(["a"])
    compact_once(collector, writer, "a")
    assert len(Trace.load(finish(collector, "a", [1], [2])).kept) == 1


def test_a_trace_that_cannot_be_written_is_dropped_and_leaves_nothing(tmp_path, monkeypatch, errors):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    compact_once(collector, writer, "a")
    assert writer.flush()

    def half(_tensors, path, _metadata):
        Path(path).write_bytes(b"half a file")
        full_disk()

    monkeypatch.setattr(trace_files, "save_file", half)
    for _ in range(3):
        finish(collector, "a", [1], [2])
    assert collector.take_dropped() == {"not_written": 3}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".writable"], "an unfinished file was left behind"
    assert len(errors()) == 1, "more than one line per minute was logged"
    now = time.monotonic()
    monkeypatch.setattr(auxiliary.time, "monotonic", lambda: now + 61)
    finish(collector, "a", [1], [2])
    assert "(2 more since the last such line)" in errors()[1]


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    folder = tmp_path / "traces"
    collector, writer = make_collector(folder), TraceWriter(str(folder), 0)
    shutil.rmtree(folder)
    compact_once(collector, writer, "a")
    assert len(Trace.load(finish(collector, "a", [1], [2])).kept) == 1


def test_a_folder_that_became_a_file_stops_nobody(tmp_path, monkeypatch, errors):
    monkeypatch.setattr(trace_collector, "WAIT_SECONDS", 0.02)
    folder = tmp_path / "traces"
    collector, writer = make_collector(folder), TraceWriter(str(folder), 0)
    shutil.rmtree(folder)
    folder.write_text("")
    compact_once(collector, writer, "a")
    finish(collector, "a", [1], [2])
    collector.sent([], [Started("b", "rkv", 1, 1, 1)])
    finish(collector, "b", [1], [2])
    assert collector.take_dropped() == {"missing_part": 1, "not_written": 1}


def test_storage_that_hangs_delays_nobody_and_holds_little_memory(tmp_path, monkeypatch, errors):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    hangs, real_save = threading.Event(), trace_files.save_file

    def slow(*args):
        hangs.wait(60)
        real_save(*args)

    monkeypatch.setattr(trace_files, "save_file", slow)
    monkeypatch.setattr(trace_collector, "WAIT_SECONDS", 2)
    monkeypatch.setattr(collector._jobs, "_max_waiting", 4)
    monkeypatch.setattr(writer._jobs, "_max_waiting", 4)
    started = time.monotonic()
    for i in range(20):
        compact_once(collector, writer, f"r{i}")
        collector.finish(f"r{i}", [1], [2])
    assert time.monotonic() - started < 5
    assert not collector.flush(0.01)
    early = collector.take_dropped()
    assert early["backlog"] >= 15, "drops must be counted while the storage hangs"
    assert any("too many are waiting" in error for error in errors())
    hangs.set()
    assert writer.flush()
    assert collector.flush(60)
    dropped = early + collector.take_dropped()
    assert dropped.total() + len(list(tmp_path.glob("*.safetensors"))) == 20
    collector.close()
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == [], (
        "parts of dropped traces were left behind"
    )


def test_an_idle_engine_waits_a_moment_for_its_traces_and_once_for_storage_that_hangs(tmp_path, monkeypatch):
    collector, hangs, real_save = make_collector(tmp_path), threading.Event(), trace_files.save_file
    waits, real_flush = [], collector._jobs.flush
    monkeypatch.setattr(collector._jobs, "flush", lambda timeout: waits.append(timeout) or real_flush(timeout))
    monkeypatch.setattr(trace_collector, "SETTLE_SECONDS", 30)
    collector.finish("a", [1], [2])
    collector.settle()
    assert trace_path(tmp_path, "a").exists()

    monkeypatch.setattr(trace_collector, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(trace_files, "save_file", lambda *args: hangs.wait(60) and real_save(*args))
    collector.finish("b", [1], [2])
    for _ in range(50):
        collector.settle()
    assert waits == [30, 0.01], "an engine must wait only once for storage that hangs"
    hangs.set()
    assert collector.flush(60)
    monkeypatch.setattr(trace_collector, "SETTLE_SECONDS", 30)
    collector.finish("c", [1], [2])
    collector.settle()
    assert trace_path(tmp_path, "c").exists()


def test_a_missing_part_holds_up_no_other_trace(tmp_path, monkeypatch):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    collector.sent([], [Started("a", "rkv", 1, 1, 1)])
    collector.sent([order("a", 0, 24, 24, 16)], [])
    collector.finish("a", [1], [2])
    for i in range(40):
        compact_once(collector, writer, f"r{i}")
        collector.finish(f"r{i}", [1], [2])
    deadline = time.monotonic() + trace_collector.WAIT_SECONDS / 2
    while len(list(tmp_path.glob("*.safetensors"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(tmp_path.glob("*.safetensors"))) == 40
    assert not collector._jobs.is_idle, "the other trace must still wait for its part"
    # The part arrives after all.
    writer.started("a")
    writer.compacted(order("a", 0, 24, 24, 16), kept(0, 0, 16), None)
    assert collector.flush(60)
    assert len(Trace.load(trace_path(tmp_path, "a")).kept) == 1
    assert collector.take_dropped() == {}


def test_a_thread_that_cannot_start_costs_traces_only(tmp_path, monkeypatch, errors):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        compact_once(collector, writer, "a")
        collector.finish("a", [1], [2])
        collector.settle()
    assert collector.take_dropped() == {"backlog": 1}
    assert "no thread can be started" in errors()[0]
    compact_once(collector, writer, "b")
    assert len(Trace.load(finish(collector, "b", [1], [2])).kept) == 1


def test_parts_of_a_killed_server_are_removed_one_day(tmp_path):
    for name, age in {"old": 2, "new": 0}.items():
        folder = tmp_path / ".parts" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age * 86400,) * 2)
    make_collector(tmp_path)
    assert {p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()} == {"new"}


def test_an_orderly_end_leaves_no_parts(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    compact_once(collector, writer, "running")
    compact_once(collector, writer, "finished")
    assert writer.flush()
    collector.finish("finished", [1], [2])
    collector.close()
    assert trace_path(tmp_path, "finished").exists()
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == []


def test_an_unwritable_folder_is_refused_at_start(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(KVPolicyError, match=r"kv_trace_dir='.*below' cannot be written \(.*\); give a folder that can"):
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
