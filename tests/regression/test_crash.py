"""A process of the server is killed, or clients leave: an error instead of a hang, and no block is lost."""

from __future__ import annotations

import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from openai import APIError, OpenAI

from benchmarks.server import metrics, serve
from benchmarks.tiny_reasoner.problems import problems
from skipkv_vllm import bundled_model
from tests import harness
from tests.engine.test_server import free_port, vllm_metric

LONG = 1500
ARGUMENTS = """
    --served-model-name tiny --kv-policy skipkv --kv-budget 64 --kv-buffer 32 --block-size 32 --max-model-len 2048
    --num-gpu-blocks-override 128 --max-num-seqs 16 --dtype float32 --enforce-eager --kv-check-integrity
    --tensor-parallel-size 2
"""
QUESTIONS = [problem.question for problem in problems("demo", 8)]
PATIENCE = 60
"""Seconds until clients must have received an error and the server must have ended."""


class Server:
    """A running server and its processes."""

    def __init__(self, url: str, port: int) -> None:
        self.url = url
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        (self.process,) = [p for p in psutil.Process().children() if str(port) in p.cmdline()]

    def child(self, title: str) -> psutil.Process:
        """Return the process with this title."""
        return next(p for p in self.process.children(recursive=True) if title in " ".join(p.cmdline()))

    def stream(self, question: str, max_tokens: int):
        return self.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@contextmanager
def running(log: Path) -> Iterator[Server]:
    port = free_port()
    with serve(bundled_model(), ARGUMENTS.split(), port=port, log=log) as url:
        yield Server(url, port)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a user's server, with one thread for each of the two workers."""
    harness.shutdown()
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def leave_at_random(server: Server) -> None:
    """Clients disconnect: in the queue, during their prompt, or later."""
    chance = random.Random(0)
    after = [chance.choice([0, 1, 5, 40, 120]) for _ in range(24)]

    def ask(number: int) -> bool:
        with server.stream(QUESTIONS[number % len(QUESTIONS)], 150) as stream:
            for i, _ in enumerate(stream):
                if i == after[number] and number % 4:
                    return False
        return True

    with ThreadPoolExecutor(20) as clients:
        assert sum(clients.map(ask, range(len(after)))) == len(after) / 4
    deadline = time.monotonic() + 20
    while vllm_metric(server.url, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    # Gauges describe the last step, which may have included requests that have left since.
    assert list(server.stream(QUESTIONS[0], 2))
    while vllm_metric(server.url, "vllm:kv_cache_usage_perc") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert vllm_metric(server.url, "vllm:kv_cache_usage_perc") == 0
    held = metrics(server.url)
    assert held["skipkv_resident_tokens"] == held["skipkv_promised_pages"] == 0
    assert held["skipkv_compactions_total"] > 20


def kill_under_load(server: Server, title: str) -> None:
    """Kill a process while clients wait: each gets an error in time, and the server ends and leaves no process."""

    def read(number: int) -> str:
        """Repeat requests until an answer breaks off; return its error."""
        while not over.is_set():
            reason = None
            try:
                for chunk in server.stream(QUESTIONS[number], LONG):
                    begun[number].set()
                    reason = chunk.choices[0].finish_reason or reason
            except (APIError, httpx.TransportError) as error:
                return repr(error)
            if reason is None:
                return "closed"
        return ""

    def wait() -> str:
        """The same with whole answers."""
        while not over.is_set():
            try:
                server.client.completions.create(
                    model="tiny", prompt="Hi", max_tokens=LONG, extra_body={"ignore_eos": True}
                )
            except APIError as error:
                return repr(error)
        return ""

    over = threading.Event()
    begun = [threading.Event() for _ in range(3)]
    family = [server.process, *server.process.children(recursive=True)]
    with ThreadPoolExecutor(len(begun) + 1) as clients:
        asking = [clients.submit(wait), *(clients.submit(read, number) for number in range(len(begun)))]
        try:
            assert all(each.wait(PATIENCE) for each in begun)
            assert not any(client.done() for client in asking)
            server.child(title).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            for client in asking:
                print("a client saw:", client.result(timeout=PATIENCE))
        finally:
            over.set()
    print(f"all clients heard of it after {time.monotonic() - killed:.1f} s")
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive
    print(f"the server was gone after {time.monotonic() - killed:.1f} s")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)


def test_a_killed_process_is_an_error_for_clients_and_a_restarted_server_works(tmp_path: Path) -> None:
    """Kill a worker, then the engine core of the next server."""
    with running(tmp_path / "first") as server:
        leave_at_random(server)
        # A server may put two tokens into one chunk when its client is slow.
        expected = "".join(chunk.choices[0].delta.content for chunk in server.stream(QUESTIONS[1], 150))
        kill_under_load(server, "Worker")
    with running(tmp_path / "second") as server:
        answer = "".join(chunk.choices[0].delta.content for chunk in server.stream(QUESTIONS[1], 150))
        assert answer == expected
        assert metrics(server.url)["skipkv_compactions_total"] > 0
        kill_under_load(server, "EngineCore")
