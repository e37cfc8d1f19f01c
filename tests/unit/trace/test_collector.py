"""Parts of the workers that the scheduler joins come back unchanged."""

from __future__ import annotations

import pytest
import torch

from skipkv_vllm.core.orders import Started
from skipkv_vllm.trace.files import Trace
from skipkv_vllm.trace.writer import TraceWriter
from tests.unit.trace.parts import DOT, HEADS, LAYERS, finish, kept, make_collector, order, similar


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
