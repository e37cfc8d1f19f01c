"""Start and stop a `vllm serve` of this environment, and read its metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 300


class ServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


@contextmanager
def serve(model: str, arguments: Sequence[str], *, port: int, log: Path) -> Iterator[str]:
    """Run `vllm serve model *arguments` until the block is left.

    Args:
        model: path or name.
        arguments: further flags.
        port: on 127.0.0.1.
        log: where its output goes.

    Yields:
        The base URL, once the server is healthy.

    Raises:
        ServerError: it exited or was not healthy in time.
    """
    if _is_healthy(f"http://127.0.0.1:{port}"):
        raise ServerError(f"port {port} is already in use by a server; stop it or choose another port")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | dict(os.environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerError(f"vllm serve did not become healthy; full log: {log}\n{tail}")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process it started."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def metrics(url: str) -> dict[str, float]:
    """All `skipkv_` samples of a server, summed over engines; a label other than the engine is appended
    to the name as `name{value}`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("skipkv_") and not sample.name.endswith("_created"):
                labels = [value for key, value in sample.labels.items() if key not in ("engine", "pid")]
                name = sample.name + "".join(f"{{{value}}}" for value in labels)
                values[name] = values.get(name, 0.0) + sample.value
    return values
