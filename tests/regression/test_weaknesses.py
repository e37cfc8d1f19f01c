"""One small test per weakness by design of other KV-eviction projects that no other test covers.

`register/` lists all of them with their tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skipkv_vllm.core.device import to_device
from tests.harness import REPOSITORY
from tests.simulation import Simulation


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            # The host must know the number of chosen elements, so such an index is read back.
            self.counts["mask"] += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def due(policy: str, names: str = "abc", **others: Any) -> Simulation:
    """Start requests of unequal lengths that are all due for a compaction in the next step."""
    sim = Simulation(policy, **others)
    sim.runtime.config = sim.runtime.config.model_copy(update={"kv_check_integrity": False})
    for i, name in enumerate(names):
        sim.start(name, num_prompt=5 + i, budget=20 + 3 * i)
    sim.step({name: 5 + i for i, name in enumerate(names)})
    for name in names:
        for _ in range(sim.keep_of(sim.running[name]) + 8 - sim.running[name].num_logical):
            sim.step({name: 1}, compact=False)
    assert not any(request.num_compactions for request in sim.running.values())
    return sim


def watch(sim: Simulation, watching: Callable[[], AbstractContextManager]) -> None:
    """Run every call of the runtime in a context; the simulation's own work stays outside."""

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with watching():
                return method(*args)

        return call

    for name in ("begin_step", "prepare", "finish_forward"):
        setattr(sim.runtime, name, watched(getattr(sim.runtime, name)))


def operators_of_a_compaction(sim: Simulation) -> Counter[str]:
    """Return the operators of a step that only compacts all requests."""
    seen = Operators()
    watch(sim, lambda: seen)
    orders = sim.step({})
    assert len(orders) == len(sim.running)
    return seen.counts


# ---- W3 to W5: what a compaction costs


def test_w3_only_what_fills_a_hole_is_moved():
    """R-KV rewrites all survivors. Here a slot changes only if its token was evicted, so at most `buffer` do."""
    sim = due("rkv", "a")
    before = sim.positions("a")
    (order,) = sim.step({})
    after = sim.positions("a")
    stay = before[..., : order.num_keep]
    moved = (after != stay).sum(-1)
    assert 0 < moved.min() <= moved.max() <= order.num_resident - order.num_keep == 8
    # Tokens that stay have not been written, not even with the same content.
    held = [set(row.tolist()) for row in after.flatten(0, 1)]
    for old, new, survivors in zip(stay.flatten(0, 1), after.flatten(0, 1), held, strict=True):
        assert all(a == b for a, b in zip(old.tolist(), new.tolist(), strict=True) if a in survivors)
    sim.check("a")


SCORED = {
    "default": ("skipkv", {}, ("measure_attention", "key_similarity")),
    "paper": ("skipkv", {"compat": "paper"}, ("score_tokens",)),
    "rkv": ("rkv", {}, ("score_tokens",)),
}
"""Methods that operators score: name, parameters, operators."""


@pytest.mark.parametrize("method", SCORED)
def test_w4_launches_do_not_grow_with_layers(method):
    policy, parameters, operators = SCORED[method]
    few = operators_of_a_compaction(due(policy, parameters=parameters))
    many = operators_of_a_compaction(due(policy, parameters=parameters, num_layers=7))
    for name in (*operators, "select_keep", "compact_pages"):
        assert sum(number for each, number in few.items() if each.endswith(f".{name}")) == 1
    assert many == few


VIEWS = {f"aten.{name}" for name in ("slice", "select", "expand", "unsqueeze", "unbind", "lift_fresh", "scalar_tensor")}
"""Operators that launch nothing."""


@pytest.mark.parametrize("method", SCORED)
def test_w8_requests_of_unequal_length_are_compacted_together(method):
    policy, parameters, _ = SCORED[method]
    two, several = (operators_of_a_compaction(due(policy, names, parameters=parameters)) for names in ("ab", "abcd"))
    if method == "default":
        # Each request has its own sums. Everything else is computed for all requests at once.
        alone = several - two
        assert not any(name.startswith("skipkv") for name in alone)
        assert sum(number for name, number in alone.items() if name not in VIEWS) <= 2 * 10
    else:
        assert several == two


MEMORY = """
import torch
from skipkv_vllm import ops
from skipkv_vllm.ops.paging import Layout, PagedCache

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

ops.warn_if_slow("cpu")
def score(length):
    cache = PagedCache.of([torch.randn(-(-length // 16) + 1, 1, 16, 16)], Layout.ROWS)
    table = torch.arange(1, -(-length // 16) + 1, dtype=torch.int32)[None]
    positions = torch.arange(length, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    number = torch.tensor([length], dtype=torch.int32)
    return torch.ops.skipkv.score_tokens(
        *cache, table, positions, number, torch.randn(1, 1, 4, 1, 8), None, 7, 0.1, 0.5
    )
score(256)
before = peak()
assert score(LENGTH).isfinite().sum() >= LENGTH - 4
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_w5_scores_take_memory_by_the_token_not_by_the_pair():
    length = 24000
    script = MEMORY.replace("LENGTH", str(length))
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    pairs = length**2 * 4 / 2**20
    assert float(done.stdout.split()[-1]) < 64 < pairs / 30


# ---- W6, W7, W9: what a step costs


@pytest.mark.parametrize("policy", ["skipkv", "rkv", "h2o", "snapkv", "streaming_llm", "random"])
def test_w6_no_step_waits_for_the_device(policy, monkeypatch):
    """CPUs never wait, so every operation that would read a value from a GPU is forbidden while the runtime works."""
    waits = ("mask", *(f"aten.{x}" for x in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")))
    reading: list[str] = []
    is_inside = False

    def forbid(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def guarded(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_inside:
                reading.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, guarded)

    @contextmanager
    def inside() -> Iterator[None]:
        nonlocal is_inside
        is_inside, seen = True, Operators()
        with seen:
            yield
        is_inside = False
        reading.extend(name for name in waits if seen.counts[name])

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        forbid(name)
    sim = due(policy)
    watch(sim, inside)
    for _ in range(20):
        sim.step(dict.fromkeys(sim.running, 1))
    assert all(request.num_compactions >= 2 for request in sim.running.values())
    assert not reading


def test_w7_a_compaction_sends_nothing_about_other_requests(monkeypatch):
    """R-KV's port builds a map of all slots of all requests in any step that compacts one."""

    def sent_in_steps(num_held: int) -> list[int]:
        sim = due("skipkv", "a", num_blocks=200)
        sim.start("other", num_prompt=num_held, budget=300)
        sim.step({"other": num_held}, compact=False)
        sizes: list[int] = []

        def recorded(data: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            tensor = to_device(data, dtype, device)
            sizes.append(tensor.nbytes)
            return tensor

        @contextmanager
        def recording() -> Iterator[None]:
            with monkeypatch.context() as patch:
                for name, module in list(sys.modules.items()):
                    if name.startswith("skipkv_vllm.worker.") and hasattr(module, "to_device"):
                        patch.setattr(module, "to_device", recorded)
                yield

        watch(sim, recording)
        assert sim.step({"a": 1, "other": 1})
        return sizes

    few = sent_in_steps(20)
    assert few
    assert sent_in_steps(200) == few


def test_w9_queries_are_recorded_only_where_a_compaction_can_read_them():
    sim = Simulation("rkv", buffer=32)
    sim.start("a", num_prompt=6, budget=20)
    sim.step({"a": 6})
    recorded = 0
    for _ in range(4 * 32):
        sim.step({"a": 1})
        recorded += sim.runtime.signals.queries.recording
    assert sim.running["a"].num_compactions >= 3
    # The window before each compaction and nothing else.
    assert recorded <= 4 * (sim.config.kv_window + 1)


# ---- W17: a late compaction does not stop the server


def test_w17_a_request_past_its_bound_waits_for_its_compaction():
    """R-KV raises where a compaction was missed. Here the next step makes up for it."""
    sim = due("skipkv", "ab")
    for _ in range(5):
        sim.step({"a": 1, "b": 1}, compact=False)
    late = [request.planner.due(request.num_logical, request.num_evicted) for request in sim.running.values()]
    assert [plan.num_resident - plan.num_keep for plan in late if plan] == [13, 13]
    sim.step({})
    for name, request in sim.running.items():
        assert request.num_resident == sim.keep_of(request)
        sim.check(name)
