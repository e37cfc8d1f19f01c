"""Traces: what the workers leave and the scheduler joins comes back as it was."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from skipkv_vllm import trace as trace_module
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.errors import KVPolicyError
from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.scheduler.messages import Started
from skipkv_vllm.scheduler.planner import Compaction
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.sentences.tracker import SentenceTracker, TrackedTokens
from skipkv_vllm.trace import Trace, TraceCollector, TraceWriter

DOT = 9
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
LAYERS, HEADS = 2, 3


def config_for(folder) -> KVPolicyConfig:
    return KVPolicyConfig(kv_policy="skipkv", kv_budget=16, kv_trace_dir=str(folder))


def make_collector(folder, ranks: int = 1, tables: SentenceTables | None = TABLES, stages: int = 1) -> TraceCollector:
    return TraceCollector(config_for(folder), (stages, ranks), tables, {"model": "m", "kv_budget": 16})


def order(request_id: str, ordinal: int, logical: int, resident: int, keep: int) -> Compaction:
    return Compaction(request_id, logical, resident, keep, [1, 2], [1], ordinal)


def kept(rank: int, seed: int, keep: int) -> Tensor:
    """Survivors of one rank: ascending positions that differ by layer, head and rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    rows = [torch.randperm(40, generator=generator)[:keep].sort().values for _ in range(LAYERS * HEADS)]
    return torch.stack(rows).view(LAYERS, HEADS, keep)


def tracker_with_repeats() -> SentenceTracker:
    """Sentences 0 and 2 say the same, 1 something else."""
    tracker = SentenceTracker(
        TABLES,
        SentenceOptions(0.9, 16),
        num_slots=2,
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
    return tracker


def test_two_ranks_come_back_as_one(tmp_path):
    collector, writers = make_collector(tmp_path, ranks=2), [TraceWriter(str(tmp_path), r) for r in (0, 1)]
    start = Started("chat/1", "skipkv", 4, 4, 4)
    orders = [order("chat/1", 0, 24, 24, 16), order("chat/1", 1, 32, 24, 16)]
    collector.started(start)
    for writer in writers:
        writer.started("chat/1")
    for one in orders:
        collector.compacted(one)
        for rank, writer in enumerate(writers):
            writer.compacted(one, kept(rank, one.ordinal, 16), tracker_with_repeats(), 1)
    prompt, output = [1, 2, 3, DOT], [5, 6, DOT, DOT, 8, 7, DOT, 5]
    path = collector.finish("chat/1", prompt, output)

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
    collector.started(Started("a", "skipkv", 4, 4, 4))
    one = order("a", 0, 24, 24, 16)
    collector.compacted(one)
    for rank in range(4):
        writer = TraceWriter(str(tmp_path), rank)
        writer.started("a")
        # Only the last stage, ranks 2 and 3, follows sentences.
        writer.compacted(one, kept(rank, 0, 16), tracker_with_repeats() if rank >= 2 else None, 1)
    trace = Trace.load(collector.finish("a", [1, 2, 3, DOT], [5, 6]))
    first, last = (torch.cat([kept(rank, 0, 16), kept(rank + 1, 0, 16)], dim=1) for rank in (0, 2))
    assert torch.equal(trace.kept[0], torch.cat([first, last]).int())
    assert trace.similar_pairs.tolist() == [[0, 2]]


def test_parts_are_removed_and_other_requests_are_left_alone(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    for name in ("a", "b"):
        collector.started(Started(name, "rkv", 1, 1, 1))
        writer.started(name)
        one = order(name, 0, 24, 24, 16)
        collector.compacted(one)
        writer.compacted(one, kept(0, 0, 16), None, 0)
    collector.finish("a", [1], [2])
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == ["b"]
    collector.finish("b", [1], [2])
    assert [p.name for p in (tmp_path / ".parts").iterdir() if p.is_dir()] == []
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}


def test_many_compactions_keep_their_order(tmp_path):
    # "kept/10" sorts before "kept/2" as text.
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    collector.started(Started("a", "rkv", 1, 1, 1))
    writer.started("a")
    for i in range(12):
        one = order("a", i, 24 + 8 * i, 24, 16)
        collector.compacted(one)
        writer.compacted(one, torch.full((LAYERS, HEADS, 16), i), None, 0)
    trace = Trace.load(collector.finish("a", [1], [2]))
    assert [int(rows[0, 0, 0]) for rows in trace.kept] == list(range(12))


def test_a_preempted_request_has_several_lives(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    seen = []
    for life in range(3):
        collector.started(Started("a", "rkv", 1, 1, 1))
        writer.started("a")
        for ordinal in range(life):
            # The ordinal starts over in every life; parts must not be mixed up.
            one = order("a", ordinal, 24 + life, 24, 16)
            collector.compacted(one)
            writer.compacted(one, torch.full((LAYERS, HEADS, 16), 10 * life + ordinal), None, 0)
            seen.append((life, 10 * life + ordinal))
    trace = Trace.load(collector.finish("a", [1], [2]))
    assert trace.life.tolist() == [life for life, _ in seen] == [1, 2, 2]
    assert [int(rows[0, 0, 0]) for rows in trace.kept] == [value for _, value in seen]


def test_an_id_that_is_used_again_starts_with_life_0(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    for round_ in range(2):
        collector.started(Started("a", "rkv", 1, 1, 1))
        writer.started("a")
        one = order("a", 0, 24, 24, 16)
        collector.compacted(one)
        writer.compacted(one, torch.full((LAYERS, HEADS, 16), round_), None, 0)
        trace = Trace.load(collector.finish("a", [1], [2]))
        writer.finished(["a"])
        assert trace.life.tolist() == [0]
        assert int(trace.kept[0][0, 0, 0]) == round_


def test_pairs_found_at_any_compaction_are_kept(tmp_path):
    collector, writer = make_collector(tmp_path), TraceWriter(str(tmp_path), 0)
    collector.started(Started("a", "skipkv", 0, 0, 0))
    writer.started("a")
    first, second = order("a", 0, 24, 24, 16), order("a", 1, 32, 24, 16)
    for one in (first, second):
        collector.compacted(one)
    writer.compacted(first, kept(0, 0, 16), tracker_with_repeats(), 1)
    writer.compacted(second, kept(0, 1, 16), tracker_with_repeats(), 0)  # a slot without sentences
    trace = Trace.load(collector.finish("a", [1], [2]))
    assert trace.similar_pairs.tolist() == [[0, 2]]


@pytest.mark.parametrize("managed", [True, False])
def test_a_request_that_was_never_compacted(tmp_path, managed):
    collector = make_collector(tmp_path)
    if managed:
        collector.started(Started("a", "rkv", 2, 2, 2))
    trace = Trace.load(collector.finish("a", [1, DOT], [3, DOT, 4]))
    assert trace.kept == []
    assert trace.logical_length.shape == trace.life.shape == (0,)
    assert trace.similar_pairs.shape == (0, 2)
    assert trace.sentences.tolist() == ([[2, 4]] if managed else [[0, 2], [2, 4]])
    assert trace.parameters["request_policy"] == ("rkv" if managed else "full")


def test_without_a_tokenizer_there_are_no_sentences(tmp_path):
    trace = Trace.load(make_collector(tmp_path, tables=None).finish("a", [1, DOT], [3, DOT]))
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
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"], "no unfinished file stays behind"


def test_a_missing_part_is_a_timeout_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_module, "WAIT_SECONDS", 0.02)
    collector, writer = make_collector(tmp_path, ranks=2), TraceWriter(str(tmp_path), 0)
    collector.started(Started("a", "rkv", 1, 1, 1))
    writer.started("a")
    one = order("a", 0, 24, 24, 16)
    collector.compacted(one)
    writer.compacted(one, kept(0, 0, 16), None, 0)
    with pytest.raises(TimeoutError, match=r"no trace part .*rank1"):
        collector.finish("a", [1], [2])
    # The request is forgotten all the same, and the same id works again.
    collector.started(Started("a", "rkv", 1, 1, 1))
    assert Trace.load(collector.finish("a", [1], [2])).kept == []


def test_an_unwritable_folder_is_refused_at_start(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(KVPolicyError, match=r"kv_trace_dir='.*below' cannot be written \(.*\); name a folder that can"):
        make_collector(file / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_start(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(KVPolicyError, match="cannot be written"):
        make_collector(tmp_path)


def test_request_ids_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "traces"
    path = make_collector(folder).finish("../../etc/x y", [1], [2])
    assert path.parent == folder
    assert Trace.load(path).parameters["request_id"] == "../../etc/x y"


@pytest.mark.parametrize("request_id", ["..", "."])
def test_a_request_named_like_a_folder_removes_nothing_else(tmp_path, request_id):
    folder = tmp_path / "traces"
    collector = make_collector(folder)
    other = folder / "other.safetensors"
    other.write_text("kept")
    (folder / ".parts" / "running").mkdir()
    path = collector.finish(request_id, [1], [2])
    assert path.exists(), "the trace itself was removed"
    assert other.exists(), "another request's trace was removed"
    assert (folder / ".parts" / "running").exists(), "another request's parts were removed"


def test_ids_that_differ_only_in_odd_characters_do_not_share_a_file(tmp_path):
    collector = make_collector(tmp_path)
    assert collector.finish("a/b", [1], [2]) != collector.finish("a_b", [1], [2])
