"""The warm-up calls every operator that requests need later, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipkv_vllm import ops
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.ops.paging import Layout
from skipkv_vllm.policies import policy_names
from skipkv_vllm.worker.requests import Rows
from skipkv_vllm.worker.runtime import EvictionRuntime
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.warm_up import warm_up
from tests.simulation import HIDDEN, Simulation
from tests.unit.worker.test_methods import simulation
from tests.unit.worker.test_steering import make_steering

WITHOUT_LOOKAHEAD = [name for name in policy_names() if name not in ("full", "laq", "finch")]


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Operators that were called, by name and dtypes; each test clears it."""
    calls: set[tuple[Any, ...]] = set()
    find = ops.function

    def watched(name: str, device: torch.device, *layout: Layout) -> Any:
        operator = find(name, device, *layout)

        def call(*args: Any) -> Any:
            calls.add((name, *(each.dtype for each in args if isinstance(each, torch.Tensor))))
            return operator(*args)

        return call

    monkeypatch.setattr(ops, "function", watched)
    return calls


def warm(sim: Simulation) -> None:
    warm_up(sim.runtime, hidden_size=HIDDEN, dtype=torch.float32, max_length=400)


@pytest.mark.parametrize(
    ("policy", "granularity"),
    [*((name, "head") for name in [*WITHOUT_LOOKAHEAD, "paper"]), ("skipkv", "sentence"), ("paper", "sentence")],
)
def test_requests_call_no_operator_that_was_not_warmed_up(
    policy: str, granularity: str, called: set[tuple[Any, ...]]
) -> None:
    # Segments that end within the test.
    parameters = {"parameters": {"segment": 16, "layers": "all"}} if policy == "thinkv" else {}
    sim = simulation(policy, granularity=granularity, protect=False, **parameters)
    warm(sim)
    assert (sim.runtime.num_compactions, sim.worker.num_requests) == (0, 0)
    warmed = set(called)
    called.clear()
    for name in ("a", "b", "c"):
        sim.start(name, num_prompt=9, budget=24)
    sim.step({"a": 9, "b": 9, "c": 5})
    for _ in range(40):
        sim.step(dict.fromkeys("abc", 1))
    # The dense copy of every request has been compared in each step.
    assert all(sim.running[name].num_compactions >= 2 for name in "abc")
    # A dummy forward pass of vLLM's records queries.
    assert {call for call in called if call[0] != "record_queries"} == warmed


def test_a_server_with_one_row_or_few_blocks_is_warmed_up_too(called: set[tuple[Any, ...]]) -> None:
    for arguments in ({"num_rows": 1}, {"num_rows": 2, "num_blocks": 20}):
        warm(Simulation("rkv", protect=False, **arguments))
        assert called
        called.clear()


def test_nothing_is_done_if_no_request_can_reach_its_bound(called: set[tuple[Any, ...]]) -> None:
    warm_up(Simulation("skipkv").runtime, hidden_size=HIDDEN, dtype=torch.float32, max_length=72)
    assert not called


def test_tokens_ahead_are_left_out(called: set[tuple[Any, ...]]) -> None:
    """They need the model, which vLLM warms up."""
    warm(Simulation("laq", protect=False))
    assert "compact_pages" in {name for name, *_ in called}


@pytest.mark.parametrize("num_rows", [1, 2])
def test_steering_is_warmed_up_on_a_server_that_evicts_nothing(num_rows: int, called: set[tuple[Any, ...]]) -> None:
    config = KVPolicyConfig(kv_steering_vectors={"math": "math.safetensors"})
    steering = make_steering(num_rows=num_rows)
    runtime = EvictionRuntime(config, Rows(0), Signals(), torch.device("cpu"), steering=steering)
    warm_up(runtime, hidden_size=HIDDEN, dtype=torch.float32, max_length=400)
    assert {name for name, *_ in called} == {"track_thoughts"}
    assert not steering._requests
