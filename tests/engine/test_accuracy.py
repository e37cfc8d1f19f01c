"""The accuracy harness on a real engine: a small grid that is interrupted and resumed equals one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.accuracy.bundled import TINY_ENGINE
from benchmarks.accuracy.run import load
from benchmarks.accuracy.samples import read_samples
from tests.harness import MODEL, REPOSITORY

ANSWERS = 2 * (1 + 2) + 1 + 2


def start(out: Path) -> subprocess.Popen[str]:
    """Start the harness in its own process, as a user does."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.accuracy",
        "run",
        "--model",
        MODEL,
        "--data",
        "tiny",
        "--out",
        str(out),
    ]
    grid = ["--policies", "full", "skipkv", "streaming_llm", "--budgets", "50%", "--batch-sizes", "2", "1"]
    rest = ["--problems", "2", "--problems-at", "1=1", "--max-tokens", "200", "--buffer", "16"]
    engine = ["--engine", json.dumps(TINY_ENGINE), "--require-batch-invariance"]
    return subprocess.Popen(
        [*command, *grid, *rest, *engine],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # If the tests run in the background, the shell ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_grid_that_was_interrupted(tmp_path):
    out = tmp_path / "run"
    process = start(out)
    deadline = time.monotonic() + 120
    while len(read_samples(out / "results.jsonl")) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to resume" in said
    before = read_samples(out / "results.jsonl")
    assert 2 <= len(before) < ANSWERS

    process = start(out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    settings, info, samples = load(out)
    assert samples[: len(before)] == before
    assert len({s.key for s in samples}) == len(samples) == ANSWERS
    assert info["failures"] == []
    assert len(info["sessions"]) == 2
    full = [s for s in samples if s.policy == "full"]
    length = sum(s.completion_tokens for s in full if s.batch_size == 2) / 2
    assert info["budgets"] == {"50%": round(length / 2)}
    assert info["kv_bytes_per_token"] == 2 * 4 * 2 * 32 * 4  # keys and values, layers, kv heads, width, float32
    for s in samples:
        assert (s.compactions > 0) == (s.policy != "full") == (s.evicted_tokens > 0)
        assert s.text.strip()
        assert s.completion_tokens <= settings.max_tokens
    (row,) = [r for r in json.loads((out / "summary.json").read_text())["batch_invariance"] if r["policy"] == "skipkv"]
    assert (row["compared"], row["other_answer"]) == (1, 0)
    assert (out / "report.html").exists()
