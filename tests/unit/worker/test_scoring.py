"""Batched scores of every method are those of its definition, from a number of calls that does not grow."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipkv_vllm.ops import native
from skipkv_vllm.ops.paging import Layout
from skipkv_vllm.policies import Policy, make_policy, policy_names
from tests.operators.cases import Pages
from tests.simulation import Simulation
from tests.unit.worker.scoring_cases import RAGGED, ScoringCase, Written

THINKV = {"segment": 16, "transition_above": 0.7, "execution_below": 0.4}
PARAMETERS: dict[str, list[dict[str, object]]] = {
    "skipkv": [{}, {"compat": "paper"}],
    "snapkv": [{}, {"pool": 1}, {"pool": 63}],
    "h2o": [{}, {"recent_share": 0.0}],
    "obcache": [{}, {"form": "value"}, {"form": "key", "queries": 2}, {"pool": 1}],
    "caote": [{"form": form, "base": base} for form in ("exact", "fast") for base in ("snapkv", "tova", "h2o")],
    "vatp": [{}, {"base": "tova"}],
    "longflow": [{}, {"base": "snapkv"}],
    "manifoldkv": [{}, {"centroid_window": 7}],
    "laq": [{}, {"with_window": True}],
    "finch": [{}, {"task_tokens": 3, "ask_chunks": True}],
    "random": [{}, {"seed": 7}],
    "trimkv": [{"gates": "not read"}],
    "thinkv": [THINKV, {**THINKV, "segment": 32}],
}
METHODS = [(name, values) for name in policy_names() if name != "full" for values in PARAMETERS.get(name, [{}])]

AHEAD = (*RAGGED, Written(30, 60, 60, ahead=4), Written(50, 90, 90, ahead=3))
ASKED = (*RAGGED, Written(30, 60, 90, ahead=3, question=True), Written(50, 50, 90, ahead=3, question=True))
REQUESTS = {"laq": AHEAD, "finch": ASKED}

CASES = {
    "rows": ScoringCase(Pages(heads=3)),
    "rows strided": ScoringCase(Pages(order="NBHC", size=5), seed=1),
    "vec": ScoringCase(Pages(Layout.VEC), seed=2),
    "amx": ScoringCase(Pages(Layout.AMX, torch.bfloat16, size=32, dim=32), seed=3),
    "e4m3 with scales": ScoringCase(Pages(dtype=torch.float8_e4m3fn), scaled=True, seed=4),
    "sinks": ScoringCase(Pages(heads=3), sinks=True, seed=5),
}


def of(case: ScoringCase, policy: Policy) -> ScoringCase:
    """Return the case with lookahead queries, for the methods that read them."""
    return dataclasses.replace(case, requests=REQUESTS.get(policy.name, case.requests))


def lengths_of(case: ScoringCase) -> list[int]:
    return [each.held for each in case.requests]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("name", "parameters"), METHODS)
def test_a_batch_is_scored_as_its_layers_are(name: str, parameters: dict[str, object], case: ScoringCase) -> None:
    policy = make_policy(name, parameters)
    case = of(case, policy)
    scorer, batch, inputs = case.build(policy)
    assert policy.is_batched
    found, wanted = scorer.scores(batch, inputs), scorer.by_layer(batch, inputs)
    tolerance = 2e-5 if case.pages.dtype is torch.float32 else 2e-4
    for r, length in enumerate(lengths_of(case)):
        a, b = found[r, ..., :length], wanted[r, ..., :length]
        # Differences of methods that give recent tokens a large bonus must show, too.
        scale = b.abs().where(b.abs() < 1e5, 0).amax(-1, keepdim=True).clamp(min=1e-6)
        assert ((a - b).abs() <= tolerance * scale).where(b.abs() < 1e5, a == b).all(), f"request {r}"
        assert a.isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), METHODS)
def test_scores_tell_tokens_and_heads_apart(name: str, parameters: dict[str, object]) -> None:
    """Or the comparison above would show little."""
    policy = make_policy(name, parameters)
    scorer, batch, inputs = of(CASES["rows"], policy).build(policy)
    rows = scorer.scores(batch, inputs)[0].flatten(0, 1)[:, : RAGGED[0].held]
    assert all(len(row.unique()) > 1 for row in rows)
    assert len(rows.unique(dim=0)) == len(rows)


class Calls(TorchDispatchMode):
    """Counts the calls of PyTorch's and our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "parameters"), METHODS)
def test_scores_take_as_many_calls_for_more_requests_and_layers(name: str, parameters: dict[str, object]) -> None:
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    policy, found = make_policy(name, parameters), []
    for layers, times in ((2, 1), (5, 3)):
        requests = REQUESTS.get(policy.name, RAGGED) * times
        scorer, batch, inputs = ScoringCase(Pages(layers=layers), requests).build(policy)
        with Calls() as calls:
            scorer.scores(batch, inputs)
        found.append(calls.names)
    assert found[0] == found[1]
    assert found[0].total() < 150


SMALL = {"thinkv": {"segment": 16, "layers": "all"}}


@pytest.mark.parametrize("name", [name for name in policy_names() if name != "full"])
def test_a_compaction_takes_as_many_calls_for_more_requests_and_layers(name: str, monkeypatch: Any) -> None:
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    protect = name not in ("laq", "finch")
    found = []
    # The gates are those of two layers.
    for layers, number in ((2, 2), (2 if name == "trimkv" else 3, 4)):
        sim = Simulation(name, parameters=SMALL.get(name), num_layers=layers, num_blocks=200, protect=protect)
        monkeypatch.setattr(sim.runtime, "check_integrity", lambda order: None)
        names = [f"r{i}" for i in range(number)]
        for each in names:
            sim.start(each, num_prompt=9, budget=40)
        sim.step(dict.fromkeys(names, 9))
        begin, steps = sim.runtime.begin_step, []

        def counted(*arguments: Any, begin: Any = begin, steps: Any = steps) -> None:
            with Calls() as calls:
                begin(*arguments)
            steps.append(calls.names)

        monkeypatch.setattr(sim.runtime, "begin_step", counted)
        for _ in range(60):
            sim.step(dict.fromkeys(names, 1))
        assert all(sim.running[each].num_compactions >= 2 for each in names)
        found.append(steps)
    assert max(step.total() for step in found[0]) > 10
    for fewer, more in zip(*found, strict=True):
        assert fewer == more


def test_a_subclass_with_its_own_definition_is_not_scored_as_its_parent() -> None:
    class Reversed(type(make_policy("snapkv"))):  # type: ignore[misc]
        def score(self, view: Any) -> Tensor:
            return -super().score(view)

    class Heavier(type(make_policy("tova"))):  # type: ignore[misc]
        def weights(self, view: Any) -> Tensor:
            return super().weights(view) ** 2

    assert not Reversed().is_batched
    assert not Heavier().is_batched
    assert type(Heavier()).weights_batch is Policy.weights_batch
    scorer, batch, inputs = CASES["rows"].build(Reversed())
    plain, _, _ = CASES["rows"].build(make_policy("snapkv"))
    held = RAGGED[0].held
    negated = -scorer.scores(batch, inputs)[0, ..., :held]
    assert torch.equal(negated, plain.by_layer(*CASES["rows"].build(make_policy("snapkv"))[1:])[0, ..., :held])
