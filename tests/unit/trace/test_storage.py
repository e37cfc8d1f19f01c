"""Traces that cannot be written: they are dropped with a message, and requests continue."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

from safetensors import SafetensorError

from skipkv_vllm.core import auxiliary
from skipkv_vllm.core.orders import Started
from skipkv_vllm.trace import collector as trace_collector
from skipkv_vllm.trace import files as trace_files
from skipkv_vllm.trace.files import Trace, trace_path
from skipkv_vllm.trace.writer import TraceWriter
from tests.unit.trace.parts import compact_once, finish, kept, make_collector, order


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
    assert any("too many writes are waiting" in error for error in errors())
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
    assert "no thread could be started" in errors()[0]
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
