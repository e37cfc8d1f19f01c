"""The JSON summaries that pages are made of: their names, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Summary = dict[str, Any]

DOCS = Path("docs")
RESULTS = Path("results")
"""Folder of summaries, figures and pages within the documentation."""

TINY = RESULTS / "tiny.json"
STEERING = RESULTS / "steering.json"
SWEEP = RESULTS / "steering-sweep.json"
UNEQUAL = RESULTS / "unequal-budgets.json"
UNEQUAL_AGAIN = RESULTS / "unequal-budgets-again.json"
FIDELITY = RESULTS / "fidelity.json"
WINDOWED_FIDELITY = RESULTS / "fidelity-gemma3.json"
OTHER_TEXTS = RESULTS / "fidelity-other-texts.json"
RECALL = RESULTS / "recall.json"
OVERHEAD = RESULTS / "overhead.json"
LARGER_OVERHEAD = RESULTS / "overhead-larger.json"
STEERING_OVERHEAD = RESULTS / "steering-overhead.json"
OPERATORS = RESULTS / "kernels.json"
OPERATORS_ON_GPU = RESULTS / "kernels-gpu.json"
PREFIX_CACHE = RESULTS / "prefix-eviction.json"
THROUGHPUT = RESULTS / "throughput.json"
SPECULATION = RESULTS / "speculation.json"
ACCEPTANCE = RESULTS / "acceptance.json"
REAL_ACCEPTANCE = RESULTS / "acceptance-smollm2.json"
SIMULATION = RESULTS / "simulation.json"
PAPER = Path(__file__).with_name("paper.json")
"""Published figures. The path is absolute, so it is the same below every folder of documentation."""


def read_summary(path: Path) -> Summary:
    """Read a summary."""
    found: Summary = json.loads(path.read_text())
    return found


def write_summary(summary: Summary, path: Path) -> None:
    """Write a summary with one line per row, so that a change is readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(summary) + "\n")


def _lines(summary: Summary) -> str:
    parts = []
    for key, value in summary.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f' "{key}": [\n  {rows}\n ]')
        else:
            # A summary within a summary.
            text = _lines(value) if isinstance(value, dict) and "arms" in value else json.dumps(value)
            parts.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}"
