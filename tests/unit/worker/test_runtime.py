"""The worker's runtime against a dense simulation: the cache must hold the right tokens after every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from skipkv_vllm.core.orders import Started, StepOrders
from skipkv_vllm.policies import View, make_policy
from skipkv_vllm.policies.thinkv import REASONING, TRANSITION
from skipkv_vllm.worker import jobs
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.signals import attention_mass
from skipkv_vllm.worker.signals.attention_mass import GROWTH
from skipkv_vllm.worker.signals.base import ForwardOutput
from tests.simulation import DOT, HIDDEN, Simulation, sentences_of

PAPER = {"compat": "paper"}
CASES = [
    (policy, granularity, protect)
    for policy in ("streaming_llm", "rkv", "skipkv", "paper", "random", "snapkv", "h2o", "trimkv")
    for granularity in ("head", "sentence")
    for protect in (True, False)
]


def simulation(policy: str, **arguments: Any) -> Simulation:
    """Simulate a method with its defaults; "paper" is the paper's rule of `skipkv`."""
    return Simulation("skipkv", parameters=PAPER, **arguments) if policy == "paper" else Simulation(policy, **arguments)


METHODS: list[tuple[str, dict[str, object]]] = [
    ("tova", {}),
    ("knorm", {}),
    ("keydiff", {}),
    ("manifoldkv", {}),
    ("manifoldkv", {"centroid_window": 8}),
    ("obcache", {}),
    ("obcache", {"form": "value"}),
    ("obcache", {"form": "key"}),
    *(("caote", {"form": form, "base": base}) for form in ("exact", "fast") for base in ("snapkv", "tova", "h2o")),
    *((method, {"base": base}) for method in ("vatp", "longflow") for base in ("snapkv", "tova", "h2o")),
]


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize(("policy", "parameters"), METHODS)
def test_methods_of_the_literature_keep_what_their_formulas_say(policy, parameters, layout):
    sim = Simulation(policy, parameters=parameters, layout=layout)
    sim.start("a", num_prompt=13, budget=30)
    sim.start("b", num_prompt=21, budget=26)
    sim.step({"a": 13, "b": 10})
    sim.step({"a": 1, "b": 11})
    for _ in range(45):
        sim.step({"b": 1, "a": 1})
    for name in ("a", "b"):
        assert sim.running[name].num_compactions >= 2
        sim.check(name)


SEGMENTS = [
    {"segment": 16, "transition_above": 0.045, "execution_below": 0.028, "layers": "all"},
    {"segment": 32, "transition_above": 0.045, "execution_below": 0.028, "layers": "1"},
]


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("parameters", SEGMENTS)
def test_segments_shrink_as_the_text_turns(parameters, protect, layout):
    sim = Simulation("thinkv", parameters=parameters, protect=protect, layout=layout, buffer=12)
    sim.start("a", num_prompt=13, budget=60)
    sim.start("b", num_prompt=30, budget=90)
    # The prompt in pieces; without protection it counts as text.
    while any(request.num_logical < request.num_prompt for request in sim.running.values()):
        sim.step({name: min(9, max(1, r.num_prompt - r.num_logical)) for name, r in sim.running.items()})
    quotas = []
    for _ in range(150):
        sim.step({"b": 1, "a": 1})
        quotas += [tuple(request.segments.quota) for request in sim.running.values()]
    for name, request in sim.running.items():
        sim.check(name)
        assert request.num_compactions >= 5
        assert any(request.segments.steps), "no segment shrank for lack of room"
        kinds = sim.config.policy.kinds(torch.tensor(request.segments.sparsities)).tolist()
        assert {TRANSITION, REASONING} <= set(kinds) if parameters["segment"] == 16 else TRANSITION in kinds
    assert {8, 4} <= {tokens for quota in quotas for tokens in quota}
    sim.stop("a", preempt=True)
    sim.start("a", num_prompt=13, budget=60)
    for _ in range(100):
        sim.step({"a": 1, "b": 1})
    sim.check("a")
    assert (
        len(sim.running["a"].segments.sparsities)
        == (sim.running["a"].num_logical - sim.running["a"].protected) // (parameters["segment"])
    ), "segments of the first life were counted"


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize("num_question", [0, 1, 3])
def test_a_prompt_is_compacted_by_its_question_as_soon_as_it_is_computed(num_question, granularity, layout):
    parameters = {"task_tokens": num_question}
    sim = Simulation("finch", protect=False, parameters=parameters, layout=layout, granularity=granularity)
    # One prompt exceeds its bound, one only its budget, one is shorter than its question, one than its budget.
    prompts, budgets = {"a": 45, "b": 27, "c": 2, "d": 15}, {"a": 26, "b": 26, "c": 26, "d": 20}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=budgets[name])
    sim.step({"a": 30, "b": 27, "c": 2, "d": 10})
    sim.step({"a": 15, "b": 1, "d": 5})
    assert [sim.running[name].num_compactions for name in prompts] == [0, 1, 0, 0]
    sim.step(dict.fromkeys(prompts, 1))
    assert [sim.running[name].num_compactions for name in prompts] == [1, 1, 0, 0]
    assert sim.running["a"].num_resident == 27
    for _ in range(40):
        sim.step(dict.fromkeys(prompts, 1))
    for name, num_prompt in prompts.items():
        assert sim.running[name].num_compactions >= 2
        # The question is held whatever was written since.
        question = set(range(max(0, num_prompt - (num_question or 4)), num_prompt))
        assert all(question <= set(held) for held in sim.positions(name).flatten(0, 1).tolist())


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("has_spare_blocks", [True, False])
def test_a_question_is_asked_after_each_chunk(has_spare_blocks, layout):
    parameters = {"ask_chunks": True, "task_tokens": 3}
    sim = Simulation("finch", protect=False, parameters=parameters, layout=layout, ratio=2, max_length=66)
    sim.has_spare_blocks = has_spare_blocks
    # In the last chunk of "a" the question would end beyond the longest sequence.
    prompts, budgets = {"a": 65, "b": 47}, {"a": 24, "b": 26}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=budgets[name])
    sim.step({"a": 32, "b": 34})
    chunks = {"a": [8, 8, 8, 8, 1], "b": [8, 5]}
    num_question = []
    while any(chunks.values()):
        sim.step({name: each.pop(0) for name, each in chunks.items() if each})
        num_question.append([request.num_lookahead for request in sim.running.values()])
    expected = [[3, 3], [3, 3], [3, 0], [3, 0], [2, 0]] if has_spare_blocks else [[0, 0]] * 5
    assert num_question == expected
    sim.step({"a": 0})
    assert [sim.running[name].num_compactions for name in prompts] == [6, 3]
    for name in prompts:
        sim.check(name)


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("has_spare_blocks", [True, False])
def test_a_prompt_is_compacted_by_tokens_that_are_decoded_ahead(with_window, has_spare_blocks, layout):
    parameters = {"with_window": with_window, "lookahead": 6}
    sim = Simulation("laq", protect=False, parameters=parameters, layout=layout, ratio=2, max_length=50)
    sim.has_spare_blocks = has_spare_blocks
    prompts = {"a": 45, "b": 27, "c": 15, "d": 29}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=26)
    sim.start("plain", num_prompt=9, budget=1, policy="none")
    # Two prompts end in the same step, one after two chunks; "a" reaches the longest sequence after five tokens.
    sim.step({"a": 20, "b": 27, "c": 15, "plain": 9})
    sim.step({"plain": 1, "a": 25, "c": 1, "d": 29})
    assert [sim.running[name].num_compactions for name in prompts] == [0, 1, 0, 0]
    free = sorted(sim.pool.free)
    sim.step(dict.fromkeys(prompts, 0))
    assert [sim.running[name].num_compactions for name in prompts] == [1, 1, 0, 1]
    assert sorted(set(free) & set(sim.pool.free)) == free, "a block was lost"
    num_drafted = [sim.running[name].num_lookahead for name in prompts]
    assert num_drafted == ([5, 6, 0, 6] if has_spare_blocks else [0, 0, 0, 0])
    for _ in range(24):
        sim.step(dict.fromkeys(prompts, 1))
    for name in (*prompts, "plain"):
        sim.check(name)
    assert [sim.running[name].num_compactions for name in prompts] == [3, 3, 1, 3]
    assert not any(sim.running[name].num_lookahead for name in prompts)


def test_queries_of_tokens_decoded_ahead_decide_other_than_the_window():
    """Otherwise the comparison above would show little."""
    kept = []
    for has_spare_blocks in (True, False):
        sim = Simulation("laq", protect=False)
        sim.has_spare_blocks = has_spare_blocks
        sim.start("a", num_prompt=45, budget=26)
        sim.step({"a": 45})
        sim.step({"a": 0})
        kept.append(sim.positions("a").sort(-1).values)
    assert (kept[0] != kept[1]).any(dim=-1).all()


@pytest.mark.parametrize("layout", ["gpu", "gpu strided", "vec"])
@pytest.mark.parametrize(("policy", "granularity", "protect"), CASES)
def test_interleaved_requests_keep_what_the_method_says(policy, granularity, protect, layout):
    sim = simulation(policy, granularity=granularity, protect=protect, layout=layout, ratio=2 if protect else 1)
    sim.start("a", num_prompt=13, budget=30)
    sim.step({"a": 13})
    sim.start("b", num_prompt=21, budget=24)
    sim.start("plain", num_prompt=5, budget=1, policy="none")
    sim.step({"a": 1, "b": 10, "plain": 5})
    sim.step({"a": 1, "b": 11, "plain": 1})
    names = ["b", "plain", "a"]
    for i in range(45):
        # The order of the batch changes, and not every request runs in every step.
        sim.chance.shuffle(names)
        sim.step({name: int(i % 5 != len(name)) for name in names})
    assert sim.running["a"].num_compactions >= 2
    assert sim.running["b"].num_compactions >= 2
    assert sim.running["plain"].num_evicted == 0
    for name in names:
        sim.check(name)
    assert sim.runtime.num_compactions == sum(r.num_compactions for r in sim.running.values())


@pytest.mark.parametrize("layout", ["gpu", "vec"])
@pytest.mark.parametrize(("policy", "granularity", "protect"), CASES)
def test_shared_pages_are_replaced_and_their_other_reader_sees_no_change(policy, granularity, protect, layout):
    sim = simulation(policy, granularity=granularity, protect=protect, layout=layout)
    sim.start("a", num_prompt=26, budget=30)
    sim.step({"a": 26})
    # "b" shares five blocks with "a" and then has its own prompt; "reader" only reads.
    sim.start("b", num_prompt=23, budget=26, shared_with="a")
    sim.start("reader", num_prompt=26, budget=1, policy="none", shared_with="a")
    assert sim.running["b"].num_logical == 20
    sim.step({"a": 1, "b": 3, "reader": 2})
    for _ in range(30):
        sim.step({"a": 1, "b": 1})
    sim.step({"reader": 1})
    for name in sim.running:
        sim.check(name)
    assert sim.running["a"].num_compactions >= 2
    assert sim.running["b"].num_compactions >= 2
    assert (sim.num_replaced > 0) == (not protect)


def test_what_gates_said_is_found_in_pages_that_another_method_wrote():
    sim = Simulation("trimkv", protect=False)
    sim.start("writer", num_prompt=26, budget=30, policy="streaming_llm")
    sim.start("plain", num_prompt=3, budget=1, policy="none")
    sim.step({"writer": 26, "plain": 3})
    sim.start("reader", num_prompt=23, budget=26, shared_with="writer")
    assert sim.running["reader"].num_logical == 20
    sim.step({"writer": 1, "reader": 3, "plain": 1})
    for _ in range(30):
        sim.step({"writer": 1, "reader": 1})
    assert sim.num_replaced
    for name in sim.running:
        sim.check(name)
    assert min(sim.running[name].num_compactions for name in ("writer", "reader")) >= 2


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


def test_flagged_sentences_leave_before_anything_else():
    # Penalties must really decide in the dense copy, or the comparison above shows little.
    sim = Simulation("skipkv", protect=False, parameters=PAPER)
    sim.start("a", num_prompt=10, budget=30)
    sim.step({"a": 10})
    for _ in range(28):
        sim.step({"a": 1}, compact=False)
    request = sim.running["a"]
    penalty = sentences_of(request, sim.config).penalty
    flagged = {p for p in range(38) if penalty(p) > 0}
    sim.step({"a": 1})
    assert request.num_compactions == 1
    held = {cell.position for cell in request.dense[0][0]}
    window = set(range(34, 38))
    assert len(flagged - window) >= 8
    assert set(range(38)) - held <= flagged


def test_different_heads_and_layers_keep_different_tokens_by_head_and_the_same_by_sentence():
    for granularity, same in (("head", False), ("sentence", True)):
        sim = Simulation("rkv", granularity=granularity)
        sim.start("a", num_prompt=6, budget=20)
        sim.step({"a": 6})
        for _ in range(30):
            sim.step({"a": 1})
        positions = sim.positions("a").sort(-1).values
        assert (positions == positions[0, 0]).all().item() is same


def test_streaming_keeps_sinks_and_the_newest():
    sim = Simulation("streaming_llm", protect=False, parameters={"sinks": 3})
    sim.start("a", num_prompt=10, budget=20)
    sim.step({"a": 10})
    for _ in range(18):
        sim.step({"a": 1})
    sim.step({"a": 0})
    assert sim.running["a"].num_compactions == 1
    assert sim.positions("a")[0, 0].sort().values.tolist() == [0, 1, 2, *range(11, 28)]


def test_random_protects_the_first_tokens_of_an_unprotected_prompt():
    sim = Simulation("random", protect=False, parameters={"sinks": 5})
    sim.start("a", num_prompt=10, budget=20)
    sim.step({"a": 10})
    for _ in range(18):
        sim.step({"a": 1})
    sim.step({"a": 0})
    for head in sim.positions("a").flatten(0, 1).sort(-1).values.tolist():
        assert head[:5] == [0, 1, 2, 3, 4]
        assert len(head) == 20


def test_h2o_keeps_the_newest_when_the_prompt_leaves_no_room_for_half_of_the_budget():
    sim = Simulation("h2o")
    sim.start("a", num_prompt=20, budget=32)
    sim.step({"a": 20})
    for _ in range(20):
        sim.step({"a": 1})
    sim.step({"a": 0})
    assert sim.running["a"].num_compactions == 1
    assert sim.positions("a")[0, 0].sort().values.tolist() == [*range(20), *range(28, 40)]


def test_random_draws_are_independent():
    policy = make_policy("random")
    draws = []
    for length in (2000, 2001, 2128):
        positions = torch.arange(length - 2000, length, dtype=torch.int32).expand(4, -1)
        for layer in range(3):
            draws.append(policy.score(View(positions=positions, window=8, layer=layer)) > 0.5)
    kept = torch.cat(draws).double()
    # Half of the tokens, half of their neighbours, and half of the tokens that any other head, layer or length keeps.
    assert (kept.mean(1) - 0.5).abs().max() < 0.06
    for distance in range(1, 20):
        both = (kept[:, distance:] * kept[:, :-distance]).mean(1)
        assert (both - 0.25).abs().max() < 0.06, distance
    overlap = kept @ kept.T / kept.shape[1]
    assert (overlap - torch.eye(len(kept)) * 0.25 - 0.25).abs().max() < 0.06


def test_random_draws_depend_on_the_head_of_the_model_not_of_the_rank():
    policy, positions = make_policy("random"), torch.arange(50, dtype=torch.int32).expand(4, -1)
    whole = policy.score(View(positions=positions, window=8))
    second = policy.score(View(positions=positions[2:], window=8, first_head=2))
    assert torch.equal(second, whole[2:])
    assert not torch.equal(second, whole[:2])


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
def test_a_call_takes_no_more_tokens_than_it_may(policy, monkeypatch):
    """Requests that are due together are split, and keep the same tokens."""
    monkeypatch.setattr(jobs, "MOST_TOKENS", 70)
    monkeypatch.setattr(attention_mass, "MOST_TOKENS", 70)
    sim = simulation(policy, protect=False)
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
    sums = sim.runtime.signals.attention_mass.sums._sums
    assert {sums[sim.worker.request(name).row].shape[-1] for name in ("long", "short")} == {GROWTH}


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


# ---- prepare


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


# ---- disagreement


def started(sim: Simulation) -> Simulation:
    sim.start("a", num_prompt=8, budget=20)
    sim.step({"a": 8})
    for _ in range(20):
        sim.step({"a": 1}, compact=False)
    return sim


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ordinal": 1}, "in 1 compactions by the scheduler"), ({"num_logical": 30}, "evicted 2 tokens")],
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


# ---- check_integrity


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
    for position, message in ((0, "protected prompt token"), (27, "observation window")):
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
