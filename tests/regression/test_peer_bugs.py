"""One small test per bug of other KV-eviction projects that can be shown without an engine.

`register/` lists all of them with their tests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.accuracy.grid import Arm
from benchmarks.accuracy.run import Run, load
from skipkv_vllm import ops
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.core.orders import Compaction, Started, StepOrders
from skipkv_vllm.ops.paging import Layout, PagedCache
from skipkv_vllm.policies import View, make_policy
from skipkv_vllm.scheduler.planner import EvictionPlanner
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.requests import Rows
from skipkv_vllm.worker.runtime import EvictionRuntime
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.queries import QueryRing
from tests.simulation import KV_HEADS, LAYERS, Simulation
from tests.unit.benchmarks.accuracy.conftest import pool  # noqa: F401
from tests.unit.benchmarks.accuracy.fakes import SETTINGS


def decode(sim: Simulation, steps: int, *names: str) -> None:
    for _ in range(steps):
        sim.step(dict.fromkeys(names or sim.running, 1))


def test_silent_no_op_above_a_size_cap():
    """R-KV: a 512 MiB cap on the similarity matrix silently switched eviction off for long requests."""
    length, keep = 3000, 256
    sim = Simulation("skipkv", page_size=16, num_blocks=220, max_tokens=4096, max_length=4096)
    sim.start("a", num_prompt=40, budget=keep)
    sim.step({"a": 40})
    sim.step({"a": length - 40}, compact=False)
    request = sim.running["a"]
    order = sim.order(request)
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    assert sim.runtime.num_compactions == 1
    assert sim.runtime.num_evicted("a") == length - keep
    request.blocks, request.num_evicted = order.target_blocks, length - keep
    positions = sim.positions("a")
    assert positions.shape == (LAYERS, KV_HEADS, keep)
    # Real survivors: distinct, the prompt and the window among them, and K where the sidecar says it is.
    for layer in range(LAYERS):
        keys, _ = sim.pool.read(layer, request.blocks, keep)
        for head in range(KV_HEADS):
            held = positions[layer, head].tolist()
            assert len(set(held)) == keep
            assert set(range(40)) | set(range(length - 4, length)) <= set(held)
            cells = request.dense[layer][head]
            assert torch.equal(keys[head], torch.stack([cells[p].key for p in held]))


def test_physical_slots_used_as_rope_positions():
    """hipfire: after an eviction the slot index was used as RoPE position, and the model looped.

    Evicted tokens reduce sequence lengths and slots only; the batch's logical positions stay.
    """
    sim = Simulation("rkv")
    sim.start("a", num_prompt=6, budget=20)
    sim.step({"a": 6})
    decode(sim, 22)
    sim.step({})
    request = sim.running["a"]
    assert (request.num_logical, request.num_resident) == (28, 20)
    starts = np.array([28], dtype=np.int64)
    evicted = sim.runtime.prepare(StepBatch(["a"], np.array([1], dtype=np.int64), starts, 1))
    assert evicted.device.tolist() == [8]
    assert starts.tolist() == [28]
    # A token written now belongs to slot 20 and has position 28.
    sim.step({"a": 1})
    assert sim.positions("a")[0, 0, 20:].tolist() == [28]
    sim.check("a")


def test_counters_not_reset_between_requests():
    """R-KV: per-request state survived the request; the next one in its slot inherited offsets and queries."""
    sim = Simulation("skipkv", num_rows=1)
    for name, prompt in (("first", 6), ("second", 9), ("third", 6)):
        sim.start(name, num_prompt=prompt, budget=20)
        sim.step({name: prompt})
        assert sim.runtime.num_evicted(name) == 0
        assert sim.last_evicted is None
        state = sim.runtime.signals.sentences.tracker.state(sim.worker.request(name).row)
        assert not state.penalties.any()
        decode(sim, 30)
        assert sim.running[name].num_compactions >= 1
        sim.stop(name)


def test_a_preempted_request_keeps_its_counter():
    """R-KV: a preempted request kept its dropped-token count, and its lengths became negative."""
    planner = EvictionPlanner(Limits(20, 8, 4, 0))
    planner.committed(116)
    planner.restart()
    assert planner.num_compactions == 0
    assert planner.due(27, 0) is None

    sim = Simulation("rkv")
    sim.start("a", num_prompt=6, budget=20)
    sim.step({"a": 6})
    decode(sim, 24)
    assert sim.runtime.num_evicted("a") == 8
    sim.stop("a", preempt=True)
    sim.start("a", num_prompt=30, budget=40)
    sim.step({"a": 30})
    assert sim.runtime.num_evicted("a") == 0
    assert sim.last_evicted is None
    assert sim.positions("a")[1, 1].tolist() == list(range(30))


def test_shared_prefix_page_overwritten():
    """R-KV: survivors were moved into blocks of a prefix that other requests shared, whose text then changed."""
    sim = Simulation("rkv", protect=False)
    sim.start("a", num_prompt=17, budget=20)
    sim.step({"a": 17})
    sim.start("reader", num_prompt=17, budget=1, policy="none", shared_with="a")
    shared = list(sim.running["reader"].blocks)
    assert len(shared) == 4
    raw = [cache[shared].clone() for cache in sim.pool.raw]
    sim.step({"reader": 1, "a": 1})
    decode(sim, 20, "a")
    assert sim.running["a"].num_compactions >= 1
    assert sim.num_replaced >= 1
    assert not set(sim.running["a"].blocks) & set(shared)
    for cache, before in zip(sim.pool.raw, raw, strict=True):
        assert torch.equal(cache[shared], before)
    sim.check("reader")


class Recorder:
    """Stands in for a policy and records its arguments."""

    is_batched = False  # so that `score` itself is called instead of the operators

    def __init__(self, policy):
        self.policy, self.views = policy, []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def score(self, view: View) -> torch.Tensor:
        self.views.append(view)
        return self.policy.score(view)


def test_selection_order_after_the_first_compaction():
    """Slots are out of order once survivors fill holes; pooling and "last similar" need ascending positions."""
    sim = Simulation("rkv")
    sim.start("a", num_prompt=6, budget=20)
    sim.step({"a": 6})
    decode(sim, 23)
    slots = sim.positions("a")[0, 0]
    assert (slots[1:] < slots[:-1]).any(), "the slots of the example must be out of order"
    recorder = Recorder(make_policy("rkv"))
    sim.worker.request("a").policy = recorder
    decode(sim, 8)
    assert len(recorder.views) == LAYERS
    for layer, view in enumerate(recorder.views):
        assert (view.positions[:, 1:] > view.positions[:, :-1]).all()
        for head in range(KV_HEADS):
            # Keys come in the same order: those of the newest tokens are the last ones.
            newest = [c for c in sim.running["a"].dense[layer][head] if 32 <= c.position < 36]
            window = {int(p): key for p, key in zip(view.positions[head], view.keys[:, head], strict=True)}
            assert all(torch.equal(window[c.position], c.key) for c in newest)


def test_mask_of_token_0_where_nothing_is_similar():
    """R-KV: with no similar key in a row, the published code clears column 0, so token 0 is always spared.

    It is part of the method as published; a rewrite that skips those rows scores token 0 differently.
    """
    # All cosines 0.2: nothing is similar, and each row loses its entry of column 0.
    gram = torch.full((4, 4), 0.2) + 0.8 * torch.eye(4)
    keys = torch.linalg.cholesky(gram).unsqueeze(1)
    scores = ops.redundancy(keys, threshold=0.5)[0]
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.15, 0.15, 0.15]).softmax(0), rtol=1e-5, atol=1e-6)
    # Row 0's own column 0 is the diagonal and already clear: it must not take another entry with it.
    assert scores[1] == pytest.approx(scores[3].item())


def test_window_empty_on_mixed_batches():
    """R-KV: in a step with prefill and decode tokens the window of the decoding request was not recorded."""
    ring = QueryRing(
        num_layers=1,
        num_rows=2,
        window=4,
        num_kept=4,
        num_heads=1,
        head_size=1,
        max_tokens=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    class Impl:
        def forward(self, layer, query):
            return query

    impl = Impl()
    ring.attach(0, impl)
    position = 10
    for chunk in (7, 1, 12, 3):
        # One decode token of slot 1 among a prefill chunk of slot 0, which lies in front of it.
        counts = np.array([chunk, 1])
        ring.place(np.array([0, 1]), counts, np.array([100, position]), int(counts.sum()))
        rows = [*(1000.0 + i for i in range(chunk)), float(position)]
        impl.forward(None, torch.tensor(rows).view(-1, 1, 1))
        position += 1
    assert ring.of_layer(0, 1, 14, 4).flatten().tolist() == [10.0, 11.0, 12.0, 13.0]


def test_evicted_before_a_window_was_observed():
    """R-KV: triggered on absolute length, the first compaction scored the prompt with an empty window."""
    limits = Limits(20, 8, 4, 0)
    planner = EvictionPlanner(limits)
    # Whatever the prefix cache holds, the queries of a window are computed before the request is due.
    assert limits.cacheable == 24
    assert planner.due(27, 0) is None
    assert planner.due(28, 0) is not None


def test_a_stale_count_is_not_carried_out():
    """R-KV: step N + 1 used the count of step N - 1 and overwrote live tokens. Here a wrong count is an error."""
    config = KVPolicyConfig(kv_policy="streaming_llm", kv_budget=16, kv_window=4)
    runtime = EvictionRuntime(config, Rows(2), Signals(), torch.device("cpu"))
    raw = torch.randn(8, 1, 4, 16)
    before = raw.clone()
    runtime.bind_cache(PagedCache.of([raw], Layout.ROWS), 4)
    runtime.begin_step(StepOrders([], [Started("a", "streaming_llm", 4, 4, 4)]), [], [])
    stale = Compaction("a", 40, 24, 16, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4], 0)
    with pytest.raises(RuntimeError, match="disagree"):
        runtime.begin_step(StepOrders([stale], []), [], [])
    assert torch.equal(raw, before)


def test_defaults_differ_from_the_papers():
    """R-KV's port weighed importance with 0.07 instead of 0.1 and lost 2.5 points."""
    policy = make_policy("skipkv")
    assert (policy.mix, policy.pool, policy.redundancy_threshold) == (0.1, 7, 0.5)


def test_a_cache_view_that_is_not_contiguous():
    """R-KV: a `view` of a permuted cache copied it, and compactions went into the copy."""
    physical = torch.zeros(6, 4, 2, 16)
    logical = physical.transpose(1, 2)
    physical[2, 1, 0] = 7.0
    sidecar, positions = torch.zeros(1, 6, 2, 4, dtype=torch.int32), torch.arange(8).int().expand(1, 1, 2, 8)
    integers = [[[1, 2]], [[1]], [4], [[[[5], [5]]]], [[[[3], [3]]]], [[[1, 0]]]]
    torch.ops.skipkv.compact_pages(
        *PagedCache.of([logical], Layout.ROWS),
        sidecar,
        positions.contiguous(),
        *(torch.tensor(x, dtype=torch.int32) for x in integers),
    )
    assert (physical[1, 3, 0] == 7.0).all()


def test_a_row_of_the_batch_that_moved():
    """R-KV: when vLLM closes a gap in the batch, the last request moves into it; its counters stayed behind."""
    sim = Simulation("skipkv", num_rows=4)
    prompts = {"a": 5, "b": 9, "c": 13}
    for name, length in prompts.items():
        sim.start(name, num_prompt=length, budget={"a": 25, "b": 20, "c": 33}[name])
    sim.step(prompts)
    decode(sim, 30, "a", "b", "c")
    assert sim.running["b"].num_evicted > sim.running["c"].num_evicted > 0
    # Two requests change places, and nothing else happens.
    decode(sim, 1, "a", "c", "b")
    # The first request ends, the last one takes its row, and a new one takes the last one's row.
    sim.stop("a")
    sim.start("d", num_prompt=7, budget=24)
    sim.step({"c": 1, "b": 1, "d": 7})
    assert sim.last_evicted.host.tolist() == [sim.running[name].num_evicted for name in ("c", "b", "d")]
    assert sim.running["d"].num_evicted == 0
    decode(sim, 36, "c", "b", "d")
    for name in ("c", "b", "d"):
        assert sim.running[name].num_compactions >= 2
        sim.check(name)


def test_more_tokens_held_than_a_step_may_have():
    """R-KV: a map of the slots of all held tokens was as long as a step's tokens may be, and overflowed."""
    sim = Simulation("skipkv", num_rows=8, max_tokens=16, num_blocks=200)
    names = [str(i) for i in range(8)]
    for name in names:
        sim.start(name, num_prompt=16, budget=40)
        sim.step({name: 16})
    decode(sim, 60, *names)
    assert sum(request.num_resident for request in sim.running.values()) > 20 * 16
    for name in names:
        assert sim.running[name].num_compactions >= 3
        sim.check(name)


def test_pages_are_held_although_their_tokens_are_gone():
    """R-KV: attention became shorter, but no block was freed. Here blocks are freed, and by default."""
    sim = Simulation("rkv", num_blocks=12)
    sim.start("a", num_prompt=6, budget=20)
    sim.step({"a": 6})
    most = 0
    # Eleven blocks of four tokens, and far more tokens than fit into them.
    for _ in range(200):
        sim.step({"a": 1})
        most = max(most, len(sim.running["a"].blocks))
    assert most == (20 + 8) / sim.block_size
    sim.stop("a")
    assert sorted(sim.pool.free) == list(range(1, 12))


def test_an_evaluation_reads_only_the_answer_at_hand(tmp_path, pool, monkeypatch):  # noqa: F811
    """R-KV: the script graded a field of an earlier run, so accuracy stayed at 40 %."""
    arms = {Arm("full", 0, 4), Arm("skipkv", 250, 4), Arm("skipkv", 300, 4)}
    settings = replace(SETTINGS, batch_sizes=(4,), problems_at={})
    for bad in arms:
        monkeypatch.setattr(pool, "wrong", {bad})
        folder = tmp_path / str(bad)
        Run(settings, folder)()
        graded = {(Arm(s.policy, s.budget, s.batch_size), s.correct) for s in load(folder)[2]}
        assert graded == {(arm, arm != bad) for arm in arms}
