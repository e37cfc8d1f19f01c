"""With this repository's patches, vLLM's public seams replace the runtime hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import harness
from tests.harness import REPOSITORY

APPLY = REPOSITORY / "patches" / "apply.py"


@pytest.mark.skipif("patched-vllm" in os.environ.get("PYTHONPATH", ""), reason="all tests run with the patches")
def test_patched_vllm_equals_reference(tmp_path: Path) -> None:
    """Both model runners equal the oracle token for token; a child process with the patched vLLM compares them."""
    harness.shutdown()  # its memory is needed
    copy = tmp_path / "patched-vllm"
    subprocess.run([sys.executable, str(APPLY), "--to", str(copy)], check=True, capture_output=True)
    check = "from skipkv_vllm.integration.compat.seams import SEAMS, is_public; assert all(map(is_public, SEAMS))"
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{REPOSITORY}"}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment, cwd=REPOSITORY)
    tests = ["tests/engine/test_exactness.py", "-k", "test_engine_equals_reference and head"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 passed" in done.stdout
