"""All parity tests again: with other numbers of threads, and in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipkv_vllm.ops import native
from tests.operators.backends import BACKENDS, INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import CompactCase, Pages, ScoreCase
from tests.unit.ops.test_parity_selection import SelectCase


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == Backend("native")], ids=str)
def test_the_number_of_threads_changes_no_bit(backend):
    scoring, selection = ScoreCase(lengths=(200, 90, 33)).build(), SelectCase().build()
    compaction = CompactCase(Pages(heads=8)).build()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        moved = compaction.copy()
        native.compact_pages(*moved)
        results.append([native.score_tokens(*scoring), *native.select_keep(*selection), moved.sidecar, *moved.caches])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_triton_in_its_interpreter():
    """Run the parity tests of Triton in a process whose Triton interprets; see above."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("Triton's own tests run in this process")
    pytest.importorskip("triton")
    pytest.importorskip("skipkv_vllm.ops.triton_backend", reason="the Triton backend is not there")
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_parity*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton-cpu", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
