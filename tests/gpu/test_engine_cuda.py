"""The engine on a GPU: every attention backend, with and without graphs, on both model runners.

GPU kernels round differently from the oracle, which computes in float32 on the CPU. So the oracle
follows the engine's tokens and survivors and says how far off it is: from each token's probability, which is wrong at
once where attention reads a wrong page, and from the survivors' scores. Every run must have compacted every request.

`SKIPKV_GPU_TESTS=cpu` runs the same on vLLM's CPU backend, to test these tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipkv_vllm import bundled_gates, bundled_model
from skipkv_vllm.integration.compat import refusals
from tests import harness
from tests.harness import Job, Outcome
from tests.reference.comparison import Tolerance, check_replayed
from tests.reference.model import Model
from tests.wide_model import widen

ON_CPU = os.environ.get("SKIPKV_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
    ),
]

NEEDED = {"FLASH_ATTN": "vllm.vllm_flash_attn._vllm_fa2_C", "FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"}
"""Backend -> module without which it cannot run."""
IMPLEMENTATIONS = {backend: implementation for implementation, backend in refusals.BACKENDS.items()}
GRAPHS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    # Not every backend captures prefills, so vLLM may choose another mode with full graphs; see `check_graphs`.
    "full": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL"}},
}
METHODS = ["skipkv", "rkv", "h2o", "snapkv", "streaming_llm", "random"]
ROUNDING = {
    # Triton multiplies float32 in TF32.
    "float32": Tolerance(most=0.1, mean=0.003, survivors=0.01),
    "bfloat16": Tolerance(most=1.0, mean=0.01, survivors=0.02),
}

BACKENDS = ["CPU_ATTN"] if ON_CPU else list(NEEDED)
COMBINATIONS = [
    pytest.param(backend, graphs, runner, id=f"{backend}-{graphs}-{runner}")
    for backend, graphs, runner in itertools.product(BACKENDS, ["eager"] if ON_CPU else GRAPHS, ["v1", "v2"])
    if not ON_CPU or runner == "v1"  # on a CPU, the engine tests in the interpreter cover runner V2
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model whose head size every backend supports."""
    harness.shutdown()  # the children need its memory
    return str(widen(Path(bundled_model()), tmp_path_factory.mktemp("wide") / "tiny-reasoner"))


@pytest.fixture(scope="module")
def reference(model: str) -> Model:
    model_with_gates = Model(model)
    model_with_gates.load_gates(bundled_gates())
    return model_with_gates


def missing(backend: str) -> str | None:
    """Return why a backend cannot run here, or None."""
    module = NEEDED.get(backend)
    try:
        found = module is None or importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    return None if found else f"{backend} is not installed: there is no module {module}"


def dtypes_of(backend: str) -> list[str]:
    return ["float32", "bfloat16"] if backend in ("TRITON_ATTN", "CPU_ATTN") else ["bfloat16"]


def run(jobs: list[Job], model: str, backend: str, graphs: str, runner: str) -> list[Outcome]:
    """Run jobs in a child process, and check that the requested backend, graphs and runner ran."""
    if why := missing(backend):
        pytest.skip(why)
    more = GRAPHS[graphs] | {"model": model} | ({} if ON_CPU else {"attention_backend": backend})
    jobs = [replace(job, arguments=more | job.arguments) for job in jobs]
    outcomes = harness.run_in_child(jobs, {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))})
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert outcome.is_v2 == (runner == "v2")
        assert outcome.attention == IMPLEMENTATIONS[backend]
        check_graphs(graphs, outcome.graphs)
        counts = [len(trace.kept) for trace in outcome.traces]
        arguments = {name: value for name, value in job.arguments.items() if name != "model"}
        print(f"{backend}, {graphs} ({outcome.graphs}), {runner}, {arguments}: {sum(counts)} compactions {counts}")
    return outcomes


def check_graphs(asked: str, got: str) -> None:
    """Check that vLLM chose the requested graph mode or another one of the same kind."""
    kinds = {"eager": {"NONE"}, "piecewise": {"PIECEWISE"}, "full": {"FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}}
    assert got in kinds[asked], f"requested {asked} graphs, vLLM chose {got}"


def evicting(policies: list[str] = METHODS, **arguments: Any) -> Job:
    prompts = harness.demo_prompts(len(policies), at_least=100)
    return Job(prompts, policies, 330, every=5, arguments=arguments, num_logprobs=1)


@pytest.mark.parametrize(("backend", "graphs", "runner"), COMBINATIONS)
def test_equals_the_reference(backend: str, graphs: str, runner: str, model: str, reference: Model) -> None:
    """Both schedulers; granularity "sentence" goes with float32 or the only dtype."""
    first, *others = dtypes_of(backend)
    jobs = [
        evicting(dtype=first, async_scheduling=True),
        evicting(["skipkv", "rkv"], dtype=first, kv_granularity="sentence"),
        evicting(["trimkv", "rkv"], dtype=first, kv_policy="trimkv", kv_policy_config={"gates": bundled_gates()}),
        *(evicting(dtype=dtype) for dtype in others),
    ]

    outcomes = run(jobs, model, backend, graphs, runner)

    for job, outcome in zip(jobs, outcomes, strict=True):
        tolerance = ROUNDING[job.arguments["dtype"]]
        if job.arguments.get("kv_granularity") == "sentence":
            # A single sentence has many tokens.
            tolerance = tolerance._replace(survivors=0.2)
        check_replayed(job, outcome, reference, tolerance)


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(("backend", "graphs", "runner"), COMBINATIONS)
def test_equals_stock_where_nothing_is_evicted(
    backend: str, graphs: str, runner: str, cache_dtype: str, model: str
) -> None:
    arguments = {"dtype": "bfloat16", "kv_cache_dtype": cache_dtype}
    idle = replace(evicting(METHODS[:4], kv_budget=1024, **arguments), num_new=100)
    stock = replace(idle, policies=[], arguments=arguments)

    # Each in its own process, because each takes vLLM's share of the memory.
    (ours,) = run([idle], model, backend, graphs, runner)
    (theirs,) = run([stock], model, backend, graphs, runner)

    assert ours.cache == theirs.cache == ("torch.uint8" if cache_dtype == "fp8" else "torch.bfloat16")
    assert not any(len(trace.kept) for trace in ours.traces)
    assert ours.tokens == theirs.tokens
    assert ours.logprobs == theirs.logprobs


@pytest.mark.parametrize(("backend", "graphs", "runner"), COMBINATIONS)
def test_an_8_bit_cache_is_compacted(backend: str, graphs: str, runner: str, model: str, reference: Model) -> None:
    """The error of 8-bit keys is bounded by the log probabilities that the oracle gives to the engine's tokens."""
    job = evicting(dtype="bfloat16", kv_cache_dtype="fp8")

    (outcome,) = run([job], model, backend, graphs, runner)

    assert outcome.cache == "torch.uint8"
    check_replayed(job, outcome, reference, Tolerance(most=8.0, mean=0.2, survivors=0.15))


@pytest.mark.skipif(ON_CPU, reason="vLLM's CPU worker does not sleep; tests/engine/test_sleep.py has a double of it")
@pytest.mark.parametrize("gated", [False, True], ids=["skipkv", "trimkv"])
@pytest.mark.parametrize(("backend", "graphs", "runner"), COMBINATIONS)
def test_an_engine_that_slept_answers_as_before(
    backend: str, graphs: str, runner: str, gated: bool, model: str
) -> None:
    job = evicting(dtype="bfloat16", enable_sleep_mode=True)
    if gated:
        gates = {"kv_policy": "trimkv", "kv_policy_config": {"gates": bundled_gates()}}
        job = evicting(["trimkv", "rkv"], **job.arguments | gates)

    # Equal arguments, so one engine serves both.
    before, *after = run([replace(job, sleep_level=level) for level in (None, 1, 2)], model, backend, graphs, runner)

    assert all(len(trace.kept) for trace in before.traces)
    for outcome in after:
        assert outcome.tokens == before.tokens
        for trace, other in zip(outcome.traces, before.traces, strict=True):
            assert all(torch.equal(*kept) for kept in zip(trace.kept, other.kept, strict=True))


def test_what_is_not_installed_is_named() -> None:
    """Report what the tests above covered (`-rA` or `-s` shows it); always passes."""
    for backend in BACKENDS:
        print(missing(backend) or f"{backend}: {', '.join(dtypes_of(backend))}")
