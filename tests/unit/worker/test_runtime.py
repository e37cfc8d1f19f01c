"""The worker's runtime: lives of requests, orders that do not fit, and the integrity check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skipkv_vllm.core.orders import Started, StepOrders
from skipkv_vllm.policies import make_policy
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.cache import Room
from skipkv_vllm.worker.signals.base import ForwardOutput
from tests.simulation import DOT, HIDDEN, Simulation
from tests.unit.worker.test_methods import simulation


def test_a_dummy_pass_leaves_what_gates_said_alone():
    sim = Simulation("trimkv")
    sim.start("a", num_prompt=9, budget=30)
    sim.step({"a": 9})
    before = sim.runtime.signals.gates._entries.clone()
    sim.runtime.prepare_dummy()
    for block in sim.worker.attention_blocks:
        block(torch.zeros(9), torch.ones(9, HIDDEN))
    sim.runtime.signals.gates.store(torch.arange(9))
    assert torch.equal(sim.runtime.signals.gates._entries, before)
    assert before.any()


def test_a_request_may_use_another_method_than_the_server():
    sim = Simulation("skipkv", protect=False)
    sim.start("own", num_prompt=8, budget=24)
    sim.start("other", num_prompt=8, budget=24, policy="streaming_llm")
    sim.start("rkv", num_prompt=8, budget=24, policy="rkv")
    sim.step({"own": 8, "other": 8, "rkv": 8})
    for _ in range(40):
        sim.step({"own": 1, "other": 1, "rkv": 1})
    assert all(r.num_compactions >= 2 for r in sim.running.values())
    assert sim.worker.request("other").policy == make_policy("streaming_llm")
    # streaming_llm reads no queries, so none of its queries may be recorded.
    assert not sim.runtime.signals.queries.of_layer(0, sim.worker.request("other").row, 48, 4).any()


@pytest.mark.parametrize("policy", ["skipkv", "h2o", "trimkv"])
def test_a_preempted_request_starts_over_with_a_clean_state(policy):
    sim = Simulation(policy, protect=False, num_rows=2)
    sim.start("a", num_prompt=8, budget=24)
    sim.start("b", num_prompt=8, budget=24)
    sim.step({"a": 8, "b": 8})
    for _ in range(30):
        sim.step({"a": 1, "b": 1})
    assert sim.running["a"].num_compactions >= 1
    for life in range(3):
        sim.stop("a", preempt=True)
        sim.step({"b": 1})
        assert sim.runtime.num_evicted("a") == 0
        sim.start("a", num_prompt=9 + life, budget=24)
        sim.step({"a": 9 + life, "b": 1})
        for _ in range(30):
            sim.step({"a": 1, "b": 1})
        assert sim.running["a"].num_compactions >= 1


@pytest.mark.parametrize("policy", ["skipkv", "h2o", "trimkv"])
def test_slots_are_reused_without_leaking_state(policy):
    sim = Simulation(policy, protect=False, num_rows=2, num_blocks=40)
    for i in range(6):
        name = f"r{i}"
        sim.start(name, num_prompt=7 + i, budget=24)
        sim.step({name: 7 + i} | {n: 1 for n in sim.running if n != name})
        for _ in range(20):
            sim.step(dict.fromkeys(sim.running, 1))
        if len(sim.running) == 2:
            sim.stop(next(iter(sim.running)))
    assert sim.runtime.num_compactions >= 6


def test_a_request_that_starts_again_in_the_same_step_as_its_preemption():
    sim = Simulation("rkv", num_rows=1)
    sim.start("a", num_prompt=8, budget=24)
    sim.step({"a": 8})
    sim.stop("a", preempt=True)
    sim.start("a", num_prompt=8, budget=24)
    sim.step({"a": 8})
    assert sim.worker.num_requests == 1


@pytest.mark.parametrize("policy", ["skipkv", "h2o", "paper"])
@pytest.mark.parametrize("room", [Room(70), Room(200, query=2.0)], ids=["slots", "queries"])
def test_a_call_takes_no_more_than_it_may(policy, room, monkeypatch):
    """Requests that are due together are split, and keep the same tokens."""
    sim = simulation(policy, protect=False)
    monkeypatch.setattr(sim.runtime._compactor.cache, "room", room)
    names = ("a", "b", "c")
    for name in names:
        sim.start(name, num_prompt=9, budget=24)
    sim.step(dict.fromkeys(names, 9))
    for _ in range(45):
        sim.step(dict.fromkeys(names, 1))
    assert all(sim.running[name].num_compactions >= 3 for name in names)


def test_sums_are_as_long_as_their_own_request():
    sim = Simulation("skipkv", buffer=8, num_blocks=200)
    sim.start("long", num_prompt=300, budget=64)
    sim.start("short", num_prompt=5, budget=24)
    sim.step({"long": 240, "short": 5})
    sim.step({"long": 60, "short": 1})
    for _ in range(40):
        sim.step({"long": 1, "short": 1})
    assert sim.running["short"].num_compactions >= 2
    # The protected prompt is never ranked, so it has no sums.
    sums = sim.runtime.signals.attention_mass.sums[True]
    for name in ("long", "short"):
        request = sim.running[name]
        first, last = request.protected // sim.block_size, -(-request.num_resident // sim.block_size)
        assert 0 < sums.num_blocks(sim.worker.request(name).row) <= last - first


def test_finished_requests_that_were_never_managed_are_ignored():
    sim = Simulation("rkv")
    sim.runtime.begin_step(None, ["stranger"], ["another"])
    assert len(sim.worker.free_rows) == 4


@pytest.mark.parametrize("protect", [True, False])
def test_sentences_are_tracked_from_the_end_of_a_protected_prompt(protect):
    sim = Simulation("skipkv", protect=protect, seed=3)
    sim.start("a", num_prompt=20, budget=40)
    # The prompt comes in two chunks, and the second one reaches beyond it, as after a preemption.
    sim.step({"a": 12})
    sim.step({"a": 18})
    tokens = sim.running["a"].tokens
    first = 20 if protect else 0
    ends = [p for p in range(30) if p >= first and tokens[p] == DOT]
    ends = [p for p in ends if p == first or tokens[p - 1] != DOT or p - 1 < first]  # opening delimiters of a run
    assert any(tokens[p] == DOT for p in range(20)), "the prompt must have a sentence"
    state = sim.runtime.signals.sentences.tracker.state(sim.worker.request("a").row)
    closed = int((state.ends < 2**31 - 1).sum())
    assert closed == len(ends)
    assert state.first == first
    assert (state.ends[:closed] >= first).all()


def test_prepare_gives_offsets_only_when_something_was_evicted():
    sim = Simulation("streaming_llm", protect=False)
    sim.start("a", num_prompt=8, budget=20)
    sim.start("plain", num_prompt=3, budget=1, policy="none")
    sim.step({"a": 8, "plain": 3})
    assert sim.last_evicted is None
    while not sim.running["a"].num_compactions:
        sim.step({"a": 1})
    evicted = sim.runtime.prepare(StepBatch(["plain", "a", "unknown"], np.array([1, 1, 5]), np.array([3, 28, 0]), 7))
    assert evicted.device.dtype == torch.int32
    assert evicted.host.dtype == np.int32
    assert evicted.device.tolist() == evicted.host.tolist() == [0, 8, 0]


def test_a_dummy_pass_after_prepare_is_not_taken_for_the_batch():
    sim = Simulation("skipkv", protect=False)
    sim.start("a", num_prompt=8, budget=20)
    sim.step({"a": 8})
    state = sim.runtime.signals.sentences.tracker.state(0)
    sim.runtime.prepare(StepBatch(["a"], np.array([1]), np.array([8]), 1))
    sim.runtime.prepare_dummy()
    sim.runtime.finish_forward(ForwardOutput(torch.full((4,), DOT), torch.zeros(4), torch.ones(4, 6)))
    assert torch.equal(sim.runtime.signals.sentences.tracker.state(0).ends, state.ends)


def started(sim: Simulation) -> Simulation:
    sim.start("a", num_prompt=8, budget=20)
    sim.step({"a": 8})
    for _ in range(20):
        sim.step({"a": 1}, compact=False)
    return sim


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ordinal": 1}, "tokens in 1 compactions, this worker"), ({"num_logical": 30}, "counts 2 evicted tokens")],
)
def test_a_wrong_order_is_refused(change, message):
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])._replace(**change)
    with pytest.raises(RuntimeError, match=message) as error:
        sim.runtime.begin_step(StepOrders([order], []), [], [])
    assert "scheduler and worker disagree about a" in str(error.value)


def test_a_repeated_order_is_refused():
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    with pytest.raises(RuntimeError, match="disagree"):
        sim.runtime.begin_step(StepOrders([order], []), [], [])


def test_an_order_of_a_life_before_is_refused():
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    sim.runtime.begin_step(StepOrders([], [Started("a", "rkv", 8, 8, 8)]), [], ["a"])
    second = order._replace(ordinal=1, num_logical=order.num_logical + 8)
    with pytest.raises(RuntimeError, match="disagree"):
        sim.runtime.begin_step(StepOrders([second], []), [], [])


def test_check_integrity_finds_a_token_held_twice():
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    sim.runtime.check_integrity(order)
    page = order.target_blocks[-1]
    sim.worker.cache.sidecar[0, page, 0, 0] = sim.worker.cache.sidecar[0, page, 0, 1]
    with pytest.raises(AssertionError, match="held twice"):
        sim.runtime.check_integrity(order)


def test_check_integrity_finds_a_lost_prompt_token_and_window():
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    entries = sim.worker.cache.sidecar
    held = sim.runtime.held(order)[0, 0].tolist()
    missing = next(p for p in range(8, 24) if p not in held)
    for position, message in ((0, "protected prompt token"), (27, "token of the window")):
        slot = held.index(position)
        page = order.target_blocks[slot // 4]
        entries[0, page, 0, slot % 4] = missing
        with pytest.raises(AssertionError, match=message):
            sim.runtime.check_integrity(order)
        entries[0, page, 0, slot % 4] = position
    sim.runtime.check_integrity(order)


def test_check_integrity_finds_a_lost_row():
    sim = started(Simulation("rkv"))
    order = sim.order(sim.running["a"])
    sim.runtime.begin_step(StepOrders([order], []), [], [])
    sim.worker.free_rows.append(sim.worker.request("a").row)
    with pytest.raises(AssertionError, match="a row was lost"):
        sim.runtime.check_integrity(order)
