"""Methods on the worker's runtime: the cache must hold the tokens that the formulas keep, after every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipkv_vllm.policies.thinkv import REASONING, TRANSITION
from tests.simulation import Simulation, sentences_of

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
