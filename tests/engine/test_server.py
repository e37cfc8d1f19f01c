"""`vllm serve --kv-policy skipkv` from a user's side: HTTP, metrics, bad input, aborts, banner."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import metrics, serve
from benchmarks.tiny_reasoner.problems import problems
from skipkv_vllm import bundled_model
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.trace.files import Trace
from tests.entry_points import CHAT, ENDPOINTS

BUDGET, BUFFER, PAGE = 224, 64, 32
# Fewer blocks than the longest sequence takes; a server with a policy accepts that.
MAX_MODEL_LEN, POOL = 2048, 60
QUESTIONS = [p.question for p in problems("demo", 4)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start a compiled server (vLLM's default); return its URL and folder."""
    folder = tmp_path_factory.mktemp("server")
    values = torch.randn(128, generator=torch.Generator().manual_seed(7))
    values *= 80 / values.norm()
    vector = SteeringVector(values=values, layer=2, num_layers=4, base_model="tiny", method="random")
    vector.save(folder / "random.safetensors")
    arguments = (
        f"--served-model-name tiny --kv-policy skipkv --kv-budget {BUDGET} --kv-buffer {BUFFER} --block-size {PAGE} "
        f"--max-model-len {MAX_MODEL_LEN} --num-gpu-blocks-override {POOL} --max-num-seqs 8 --dtype float32 "
        f"--kv-request-policies h2o random --enable-scale-out "
        f"--kv-trace-dir {folder / 'traces'} --kv-check-integrity "
        f"--kv-steering-vectors random={folder / 'random.safetensors'}"
    ).split()
    with pytest.MonkeyPatch.context() as patch:
        # Tests that run an engine in this process set these; a user's server has neither.
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
            patch.delenv(name, raising=False)
        with serve(bundled_model(), arguments, port=free_port(), log=folder / "log") as url:
            yield url, folder


@pytest.fixture
def client(server):
    return OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=300)


def complete(client: OpenAI, question: str = QUESTIONS[0], tokens: int = 400, **xargs):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        logprobs=True,
        extra_body={"vllm_xargs": xargs, "ignore_eos": True},
    )


def difference(url: str, action) -> dict[str, float]:
    """Return by how much the counters changed while `action` ran."""
    before = metrics(url)
    action()
    time.sleep(1)
    after = metrics(url)
    return {name: after[name] - before.get(name, 0) for name in after}


def post(url: str, path: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_banner_says_what_the_server_does(server):
    log = (server[1] / "log").read_text()
    assert f"budget {BUDGET} + buffer {BUFFER} = bound {BUDGET + BUFFER} tokens" in log
    assert "59 blocks of 32 tokens" in log
    assert "a request of 2,048 tokens holds at most 9 blocks instead of 64" in log
    assert "6 such requests fit at once instead of" in log
    assert "2,048 bytes of KV per token + 128 for its position, attention, output error and query count" in log
    assert "break-even at" in log
    assert "admission bounded, no request is preempted for lack of blocks" in log
    assert "may hold more than 1888 tokens is refused" in log
    # vLLM's CPU platform switches it off for every scheduler.
    assert "Using custom scheduler class" in log
    assert "asynchronous scheduling is off, as vLLM is configured; its warning" in log


def test_metrics_count_real_compactions_and_the_trace_agrees(server, client):
    url, folder = server
    traces = folder / "traces"
    before = set(traces.glob("*.safetensors"))
    answers = []
    moved = difference(url, lambda: answers.append(complete(client)))
    (path,) = set(traces.glob("*.safetensors")) - before
    trace = Trace.load(path)
    assert moved["skipkv_compactions_total"] == len(trace.kept) >= 3
    evicted = sum(int(r) - k.shape[2] for r, k in zip(trace.resident_before, trace.kept, strict=True))
    assert moved["skipkv_evicted_tokens_total"] == evicted
    assert moved["skipkv_freed_pages_total"] > 0
    told = {"policy": "skipkv", "compactions": len(trace.kept), "evicted_tokens": evicted, "lives": 1}
    assert answers[0].kv_transfer_params == {"skipkv": told}
    after = metrics(url)
    assert after["skipkv_resident_tokens"] == after["skipkv_logical_tokens"] == after["skipkv_promised_pages"] == 0
    assert after["skipkv_peak_pages"] >= (BUDGET + BUFFER) // PAGE
    assert len(trace.output_token_ids) == 400
    assert all(k.shape[2] == max(BUDGET, len(trace.prompt_token_ids) + 8) for k in trace.kept)
    assert trace.parameters["kv_budget"] == BUDGET


@pytest.mark.parametrize("xargs", [{"kv_policy": "full"}, {"kv_budget": 1500}])
def test_a_request_can_opt_out_and_then_gets_the_stock_answer(server, client, xargs):
    answers = []
    moved = difference(server[0], lambda: answers.append(complete(client, **xargs)))
    assert moved["skipkv_compactions_total"] == 0
    reference = complete(client, kv_policy="full")
    assert reference.kv_transfer_params is None
    assert answers[0].choices[0].message.content == reference.choices[0].message.content
    logprobs = [[t.logprob for t in a.choices[0].logprobs.content] for a in (answers[0], reference)]
    assert logprobs[0] == logprobs[1]


@pytest.mark.parametrize("policy", ["rkv", "streaming_llm", "h2o", "snapkv", "random"])
def test_a_request_can_choose_another_method(server, client, policy):
    answers = []
    moved = difference(server[0], lambda: answers.append(complete(client, kv_policy=policy)))
    told = answers[0].kv_transfer_params["skipkv"]
    assert told["policy"] == policy
    assert told["compactions"] == moved["skipkv_compactions_total"] >= 3


def test_a_request_can_be_steered(server, client):
    traces = server[1] / "traces"
    before = set(traces.glob("*.safetensors"))
    answers = []
    moved = difference(server[0], lambda: answers.append(complete(client, steering="random", steering_alpha0=0.9)))
    told = answers[0].kv_transfer_params["skipkv"]
    assert told["compactions"] >= 3
    steering = told["steering"]
    assert (steering["vector"], steering["alpha0"], steering["gamma"]) == ("random", 0.9, 0.02)
    assert moved["skipkv_steered_tokens_total"] == steering["steered_tokens"] > 10
    for kind in ("execution", "reflection", "transition"):
        assert moved[f"skipkv_thoughts_total{{{kind}}}"] == steering[kind]
    assert steering["execution"] > steering["reflection"] > 0
    (path,) = set(traces.glob("*.safetensors")) - before
    assert Trace.load(path).parameters["request_steering"] == steering
    plain = complete(client)
    assert "steering" not in plain.kv_transfer_params["skipkv"]
    assert plain.choices[0].message.content != answers[0].choices[0].message.content


def test_a_bad_steering_option_is_a_400(server):
    for xargs, part in (
        ({"steering": "/etc/passwd"}, "steering='/etc/passwd' is not registered; choose one of: off, random"),
        ({"steering": "random", "steering_alpha0": 99}, "steering_alpha0=99 is out of range; allowed: at most 10"),
        ({"steering_gamma": 0.1}, "not steered"),
    ):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "vllm_xargs": xargs}
        status, answer = post(server[0], "/v1/completions", body)
        assert status == 400
        assert part in json.dumps(answer)


def events(url: str, path: str, body: dict) -> list[dict]:
    """Return the answer, or all events of a stream."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if not body.get("stream"):
            return [json.load(answer)]
        lines = answer.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def report_in(event: dict) -> dict | None:
    """Return the eviction report of an answer or an event."""
    return (event.get("response", event).get("kv_transfer_params") or {}).get("skipkv")


LONG_CHAT = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 250}
PROMPTS = {"prompt": ["Given a: 3.", "Given b: 4."], "max_tokens": 250}
RESPONSE = {"input": QUESTIONS[1], "max_output_tokens": 250}
SMALLER = {"kv_budget": 100}
SAMPLING = {"max_tokens": 250, "n": 2, "ignore_eos": True, "extra_args": SMALLER}
TOKENS = {"token_ids": [5] * 48, "sampling_params": SAMPLING}
BATCH = {"messages": [[{"role": "user", "content": question}] for question in QUESTIONS[:2]], "max_tokens": 500}


@pytest.mark.parametrize(
    ("path", "body", "choices", "last"),
    [
        ("/v1/chat/completions", LONG_CHAT | {"n": 4}, 4, 1),
        ("/v1/chat/completions", LONG_CHAT | {"n": 4, "stream": True}, 4, 4),
        ("/v1/chat/completions", LONG_CHAT | {"stream": True, "stream_options": {"include_usage": True}}, None, 2),
        ("/v1/chat/completions/batch", BATCH, 2, 1),
        ("/v1/completions", PROMPTS | {"prompt": "Given a: 3."}, None, 1),
        ("/v1/completions", PROMPTS | {"n": 4}, 8, 1),
        ("/v1/completions", PROMPTS | {"n": 4, "stream": True, "stream_options": {"include_usage": True}}, 8, 9),
        ("/v1/responses", RESPONSE, None, 1),
        ("/v1/responses", RESPONSE | {"stream": True}, None, 1),
        ("/v1/messages", LONG_CHAT, None, 1),
        ("/v1/messages", LONG_CHAT | {"stream": True}, None, 1),
        ("/inference/v1/generate", TOKENS, 2, 1),
        ("/inference/v1/generate", TOKENS | {"stream": True}, 2, 2),
    ],
)
def test_every_answer_reports_all_that_was_evicted_for_it(server, path, body, choices, last):
    """Check the report of a stream: at most `last` events carry it, and they are the last ones."""
    url = server[0]
    common = {"model": "tiny", "ignore_eos": True, "vllm_xargs": SMALLER}
    seen = []
    moved = difference(url, lambda: seen.extend(events(url, path, common | body)))
    compactions, evicted = moved["skipkv_compactions_total"], moved["skipkv_evicted_tokens_total"]
    assert compactions >= (choices or 1)
    report = {"policy": "skipkv", "compactions": compactions, "evicted_tokens": evicted, "lives": choices or 1}
    reports = [report_in(event) for event in seen if event.get("type") != "message_stop"]
    carriers = [each for each in reports if each is not None]
    assert carriers == [report if choices is None else report | {"choices": choices}] * len(carriers)
    assert 1 <= len(carriers) <= last
    assert reports[-len(carriers) :] == carriers, "an event without the report follows one with it"


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"kv_budget": 3}, ["kv_budget=3", "9 to 2048"]),
        ({"kv_budget": 99999}, ["kv_budget=99999", "9 to 2048"]),
        ({"kv_budget": "many"}, ["kv_budget='many'", "whole number"]),
        ({"kv_policy": "nope"}, ["kv_policy='nope'", "streaming_llm"]),
        ({"kv_budgett": 300}, ["kv_budgett", "did you mean 'kv_budget'"]),
        ({"Policy": "full"}, ["Policy", "did you mean 'kv_policy'"]),
        ({"window": 16}, ["window", "whole server", "--kv-window"]),
    ],
)
@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if endpoint.body and endpoint.options])
def test_a_bad_option_is_http_400_and_the_server_stays_up(server, path, xargs, words):
    endpoint = ENDPOINTS[path]
    # vLLM streams no batches.
    for stream in (False, True)[: 1 if path.endswith("/batch") else 2]:
        status, answer = post(server[0], path, endpoint.with_options(xargs, stream=stream))
        assert status == 400
        for word in (*words, f"(parameter={endpoint.options})"):
            assert word in answer["error"]["message"]
    assert post(server[0], path, endpoint.with_options({}))[0] == 200


def test_options_are_refused_where_vllm_would_ignore_them(server):
    scoring = ENDPOINTS["/generative_scoring"]
    assert post(server[0], "/generative_scoring", scoring.with_options({"session_id": "a"}))[0] == 200
    for path, body, part in (
        ("/generative_scoring", scoring.with_options({"kv_policy": "full"}), "does not read vllm_xargs"),
        ("/v1/completions", {"model": "tiny", "prompt": "Hi", "kv_budget": 300}, "write it into vllm_xargs"),
    ):
        status, answer = post(server[0], path, body)
        assert status == 400
        assert part in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/completions", {"prompt": ["Hi", "Ho"], "vllm_xargs": {"kv_policy": "full"}}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/invocations", {"prompt": "Hi"}),
    ],
)
def test_beam_search_is_http_400(server, path, body):
    asked = {"model": "tiny", "max_tokens": 2, "n": 2} | body
    status, answer = post(server[0], path, asked | {"use_beam_search": True})
    assert status == 400
    assert answer["error"]["param"] == "use_beam_search"
    assert "--kv-policy does not support beam search" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/inference/v1/generate"])
def test_a_request_that_could_outgrow_the_pool_is_http_400(server, path):
    endpoint = ENDPOINTS[path]
    status, answer = post(server[0], path, endpoint.with_options({"kv_policy": "full"}, max_tokens=2000))
    assert status == 400
    assert "the KV cache holds only 1888" in answer["error"]["message"]
    assert f"set {endpoint.max_tokens.rpartition('.')[2]} to at most" in answer["error"]["message"]
    assert answer["error"]["param"] == endpoint.max_tokens
    assert post(server[0], path, endpoint.with_options({"kv_policy": "full"}))[0] == 200


def test_aborted_requests_give_everything_back(server, client):
    url = server[0]
    for stop_after in (5, 150):
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTIONS[2]}],
            max_tokens=1500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for i, _ in enumerate(stream):
            if i == stop_after:
                break
        stream.close()
    deadline = time.monotonic() + 20
    while vllm_metric(url, "vllm:kv_cache_usage_perc") > 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert vllm_metric(url, "vllm:kv_cache_usage_perc") == 0
    assert complete(client, tokens=5).usage.completion_tokens == 5


def vllm_metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(s.value for f in families for s in f.samples if s.name == name)


def test_concurrent_streams_finish_and_stay_within_their_bounds(server, client):
    """The server verifies its bookkeeping after every step (--kv-check-integrity); a violation kills it.

    The pool is too small for all requests at once; they wait instead of preempting each other.
    """
    url = server[0]

    def run(i: int) -> int:
        policy = ["skipkv", "rkv", "streaming_llm", "full"][i % 4]
        return complete(client, QUESTIONS[i % 4], 400, kv_policy=policy).usage.completion_tokens

    before = vllm_metric(url, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [400] * 8
    assert vllm_metric(url, "vllm:num_preemptions_total") == before
    assert post(url, "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2})[0] == 200


def test_traces_are_complete(server):
    parts = Path(server[1] / "traces" / ".parts")
    assert [p.name for p in parts.iterdir()] == [".writable"], "a request left parts of its trace behind"
