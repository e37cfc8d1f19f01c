"""A model spread over several workers evicts the same tokens as one worker: the engine still equals the oracle.

Sums over ranks are taken in another order than on one device, so scores differ in the last bits. The comparison lets
the engine decide near ties only, counts them, and fails if a choice differs by more.
"""

from __future__ import annotations

import dataclasses
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import serve
from skipkv_vllm import bundled_model
from skipkv_vllm.trace.files import Trace
from tests import harness
from tests.engine import test_families as families
from tests.engine import test_prompt_methods as prompt_methods
from tests.engine import test_speculation as speculation
from tests.engine import test_steering as steering
from tests.engine.test_exactness import another_question, check, check_segments, segment_job
from tests.engine.test_server import free_port
from tests.harness import PAGE, Job, Outcome

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

METHODS = ["skipkv", "rkv", "h2o", "streaming_llm", "snapkv", "random"]
NUM_NEW = 250
TENSOR = {"tensor_parallel_size": 2}
# vLLM has no asynchronous scheduling for pipelines on Runner V1.
PIPELINE = {"pipeline_parallel_size": 2, "async_scheduling": False}
CACHED = {True: {"enable_prefix_caching": True}, False: {"enable_prefix_caching": False}}
CHUNKED = {True: {"max_num_batched_tokens": 128}, False: {"enable_chunked_prefill": False}}


pytestmark = pytest.mark.usefixtures("one_thread_a_worker")


def job(granularity: str, **arguments: Any) -> Job:
    """Run every method once, and one text twice, so that requests share and rewrite its blocks."""
    prompts = harness.demo_prompts(len(METHODS), at_least=150)
    return Job(
        [*prompts, another_question(prompts[0])],
        [*METHODS, "skipkv"],
        NUM_NEW,
        every=7,
        arguments={"kv_granularity": granularity, "max_model_len": 512, "max_num_batched_tokens": 512} | arguments,
    )


def run(one: Job, references: ReferenceCache) -> Outcome:
    """Run a job and compare it with the oracle."""
    outcome = harness.run(one)
    repeats = [len(trace.similar_pairs) for trace in outcome.traces if trace.parameters["request_policy"] == "skipkv"]
    assert all(repeats), "the texts repeat no sentence, so skipkv keeps what rkv keeps"
    check(one, outcome, references, min_compactions=2)
    return outcome


SWITCHES = {
    False: [(False, False, "head"), (True, True, "sentence")],
    True: [(True, True, "head"), (True, False, "sentence"), (False, True, "sentence")],
}
"""Prefix caching, prefill in chunks and granularity, by asynchronous scheduling; every pair of values occurs."""


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_tensor_parallelism(is_async: bool, references: ReferenceCache) -> None:
    """Prefix caching on and off, prefill in chunks and whole."""
    for is_cached, is_chunked, granularity in SWITCHES[is_async]:
        print(f"prefix caching {is_cached}, chunked prefill {is_chunked}, {granularity}:")
        switches = CACHED[is_cached] | CHUNKED[is_chunked] | {"async_scheduling": is_async}
        one = job(granularity, **TENSOR, **switches)
        outcome = run(one, references)
        config = harness.scheduler_of(harness.engine(**one.arguments)).vllm_config
        assert config.scheduler_config.async_scheduling == is_async
        assert config.parallel_config.world_size == 2
        assert outcome.num_cached[-1] >= 4 * PAGE if is_cached else outcome.num_cached[-1] == 0


def test_every_rank_counts_the_sinks_of_its_heads() -> None:
    one = families.job_of("gpt_oss", **TENSOR)
    check(one, harness.run(one), families.oracle("gpt_oss"), min_compactions=3)


def test_every_rank_has_the_latents_of_all_heads() -> None:
    """Each rank chooses for its own query heads; two methods that read no query choose the same for all."""
    one = families.job_of("deepseek_v3", **TENSOR)
    one = dataclasses.replace(one, policies=["random", "streaming_llm", "skipkv", "random", "h2o"])
    one.arguments["kv_request_policies"] = ["random", "streaming_llm", "h2o"]
    outcome = harness.run(one)
    alone = harness.run(dataclasses.replace(one, arguments=one.arguments | dict.fromkeys(TENSOR, 1)))
    for number in (0, 1, 3):
        assert outcome.tokens[number] == alone.tokens[number]
    assert all(len(tokens) == one.num_new for tokens in outcome.tokens)


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_a_drafter_on_all_ranks(granularity: str, references: ReferenceCache) -> None:
    one = speculation.job_of("eagle", is_async=True, kv_granularity=granularity, **TENSOR)
    check(one, harness.run(one), references, min_compactions=3)


def test_tokens_are_decoded_ahead_on_all_ranks(references: ReferenceCache) -> None:
    one = prompt_methods.make_job(max_model_len=512, **TENSOR)
    outcome = harness.run(one)
    check(one, outcome, references, min_compactions=1)
    assert prompt_methods.counted(harness.engine(**one.arguments), "probes") == 4
    assert outcome.skipped == {}


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_pipeline_parallelism(granularity: str, references: ReferenceCache) -> None:
    run(job(granularity, **PIPELINE), references)


def test_both(references: ReferenceCache) -> None:
    run(job("sentence", **TENSOR, **PIPELINE), references)


@pytest.mark.parametrize("size", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_segments(size: dict[str, int], references: ReferenceCache) -> None:
    """Ranks agree about the kinds of segments, although each sees the attention of its own heads and layers only."""
    segments = segment_job(**size)
    check_segments(segments, harness.run(segments), references)


@pytest.mark.parametrize("size", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_steering(size: dict[str, int], references: ReferenceCache) -> None:
    """The steered layers lie on different stages."""
    steered = steering.mixed_job(250, **size)
    steering.check(steered, harness.run(steered), references)


def run_v2(jobs: list[Job], references: ReferenceCache, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """Run jobs on runner V2, in the interpreter, and compare them with the oracle."""
    # Some layers of parallel models use compiled helpers, which the interpreter's driver cannot run.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    outcomes = harness.run_all(jobs, "v2")
    for one, outcome in zip(jobs, outcomes, strict=True):
        print(one.arguments)
        assert (outcome.is_v2, outcome.is_async) == (True, one.arguments["async_scheduling"])
        check(one, outcome, references, min_compactions=2)
    return outcomes


def small_job(granularity: str, is_async: bool, **arguments: Any) -> Job:
    """Few tokens and many compactions, because the interpreter is slow; the last prompt finds blocks of the first."""
    first, *others = harness.demo_prompts(3, at_least=150)
    arguments = {"max_model_len": 512, "max_num_batched_tokens": 512} | arguments
    arguments |= {"kv_granularity": granularity, "kv_budget": 160, "kv_buffer": 16, "async_scheduling": is_async}
    methods = ["skipkv", "rkv", "random", "skipkv"]
    return Job([first, *others, another_question(first)], methods, 45, every=3, arguments=arguments)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_tensor_parallelism_on_runner_v2(
    is_async: bool, references: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix caching on and off, prefill in chunks and whole."""
    jobs = [
        small_job(granularity, is_async, **TENSOR, **CACHED[is_cached], **CHUNKED[is_chunked])
        for is_cached, is_chunked, granularity in SWITCHES[is_async]
    ]
    outcomes = run_v2(jobs, references, monkeypatch)
    for (is_cached, *_), outcome in zip(SWITCHES[is_async], outcomes, strict=True):
        assert (outcome.num_cached[-1] >= 4 * PAGE) == is_cached


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_pipeline_parallelism_on_runner_v2(
    is_async: bool, references: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule asynchronously, vLLM's default on GPUs, and synchronously."""
    run_v2([small_job("sentence", is_async, **PIPELINE, **CHUNKED[True])], references, monkeypatch)


@pytest.mark.parametrize("size", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_ray(size: dict[str, int], references: ReferenceCache) -> None:
    """Orders reach Ray's actors, which load the plugin themselves."""
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    from tests import ray_cpu

    with ray_cpu.cluster(2):
        run(job("sentence", distributed_executor_backend=ray_cpu.CPURayExecutor, **size), references)
        harness.shutdown()


def counters(url: str) -> dict[str, dict[str, float]]:
    """Return a server's `skipkv_` samples by engine label."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("skipkv_"):
                values.setdefault(sample.labels["engine"], {})[sample.name] = sample.value
    return values


def test_data_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas behind one address: each keeps its requests within the budget and has its own counters."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    # Otherwise vLLM 0.33 wants a memory node for each replica.
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    traces = tmp_path / "traces"
    arguments = (
        "--data-parallel-size 2 --served-model-name tiny --kv-policy skipkv --kv-budget 224 --kv-buffer 64 "
        "--max-model-len 2048 --max-num-seqs 8 --dtype float32 --enforce-eager --block-size 32 "
        f"--kv-trace-dir {traces} --kv-check-integrity"
    ).split()
    with serve(bundled_model(), arguments, port=free_port(), log=tmp_path / "log") as url:
        assert set(counters(url)) == {"0", "1"}
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        told = []
        for rank in (0, 1, 1):
            answer = client.completions.create(
                model="tiny",
                prompt=harness.demo_prompts(1)[0],
                max_tokens=400,
                temperature=0,
                extra_body={"ignore_eos": True},
                extra_headers={"X-data-parallel-rank": str(rank)},
            )
            told.append((answer.choices[0].text, answer.kv_transfer_params["skipkv"]["compactions"]))
        # Several API servers share the engines; each must refuse options that an engine cannot use.
        for _ in range(4):
            with pytest.raises(BadRequestError, match="kv_budget=3 is out of range"):
                client.completions.create(model="tiny", prompt="a", extra_body={"vllm_xargs": {"kv_budget": 3}})
        time.sleep(1)
        after = counters(url)
    compactions = told[0][1]
    assert compactions >= 3
    assert told == [told[0]] * 3
    assert [after[rank]["skipkv_compactions_total"] for rank in ("0", "1")] == [compactions, 2 * compactions]
    found = [Trace.load(path) for path in traces.glob("*.safetensors")]
    assert [len(trace.kept) for trace in found] == [compactions] * 3
