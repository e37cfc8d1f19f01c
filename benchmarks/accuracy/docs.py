"""`docs/results.md`: the bundled model's figures, and the paper's beside the commands that would reproduce them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity import FIDELITY, fidelity_section
from benchmarks.kernels.section import KERNELS, kernels_section
from benchmarks.load.section import THROUGHPUT, throughput_section
from benchmarks.markdown import table
from benchmarks.simulate.section import SIMULATION, simulation_section
from benchmarks.unequal_budgets.section import AGAIN, UNEQUAL, again_section, unequal_section

from . import UsageError
from .costs import (
    LARGER_OVERHEAD,
    OVERHEAD,
    PREFIX_EVICTION,
    STEERING_OVERHEAD,
    overhead_section,
    prefix_eviction_section,
    steering_overhead_section,
)
from .plots import FIGURES
from .report import NOTES, arms_table, batch_table, headline, provenance, setting, versus_table
from .steering import read_section
from .summary import OURS, Summary

DOCS = Path("docs")
TINY = Path("results", "tiny.json")
TINY_FIGURES = "tiny-"
PAPER = Path(__file__).with_name("paper.json")

ORIGIN = {
    "figure": "Read off a figure (accuracies to about 0.2 points, lengths to about 0.5 %; `~` where markers overlap).",
    "table": "From a table of the paper.",
}

OTHERS = """The same problems, fewer of them and at fewer budgets; methods at their defaults. The gates of `trimkv` were
trained on the model (`python -m benchmarks.tiny_reasoner.train_gates`), the thresholds of `thinkv` calibrated on it at
the budget of 25 %. Prompts are shorter than every budget here, so `finch` and `laq`, which are about prompts, only show
how they go on in decode."""


def write_docs(docs: Path) -> Path:
    """Write `results.md` from `results/tiny.json` and those of the other figures that are there.

    Returns:
        The file.
    """
    if not (docs / TINY).exists():
        raise UsageError(f"{docs / TINY} does not exist; `make eval-tiny` writes it")
    page = docs / "results.md"
    tiny, paper = json.loads((docs / TINY).read_text()), json.loads(PAPER.read_text())
    page.write_text(results_page(tiny, paper, measured_sections(docs)))
    return page


def measured_sections(docs: Path) -> list[str]:
    """Paragraphs about everything but accuracy, as far as there are figures."""
    sections = {
        FIDELITY: fidelity_section,
        STEERING_OVERHEAD: steering_overhead_section,
        OVERHEAD: overhead_section,
        LARGER_OVERHEAD: overhead_section,
        KERNELS: kernels_section,
        THROUGHPUT: throughput_section,
        SIMULATION: simulation_section,
        PREFIX_EVICTION: prefix_eviction_section,
        UNEQUAL: unequal_section,
        AGAIN: again_section,
    }
    parts = read_section(docs)
    for name, section in sections.items():
        if (docs / name).exists():
            parts += section(json.loads((docs / name).read_text()))
    return parts


def write_summary(summary: Summary, path: Path) -> None:
    """Write figures as JSON with a line per arm, so that a change is readable in a diff."""
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


def results_page(tiny: Summary, paper: dict[str, Any], measured: Sequence[str] = ()) -> str:
    """The page.

    Args:
        tiny: see `summary.summarise`.
        paper: contents of `paper.json`.
        measured: see `measured_sections`.
    """
    figures = [f"![{title}]({TINY.parent}/{TINY_FIGURES}{name}.svg)" for name, title in FIGURES.items()]
    parts = [
        "# Results",
        "Made by `make eval-tiny eval-steering` from the files in `docs/results/` and"
        " `benchmarks/accuracy/paper.json`; do not edit. `python -m benchmarks.accuracy docs` writes this page again.",
        "## The bundled model, run here",
        "The bundled model is a toy that was trained on the kind of problem it is asked here. Four fifths of its text "
        "repeats an earlier sentence, and the values it must remember are stated once, in the rest: the kind of text "
        "that SkipKV is made for. All problems have the same length and the same number of doubts, so a compaction "
        "falls at the same place in each, and no method can show shorter answers. The figures show how methods and "
        "budgets compare on it, in the real engine, not how accurate another model will be. "
        "`skipkv_vllm/models/tiny-reasoner/README.md` says how the task came about. No setting is fitted "
        "to this model.",
        setting(tiny),
        headline(tiny),
        *figures,
        "### All figures",
        arms_table(tiny),
        NOTES,
    ]
    if others := tiny.get("others"):
        pairs = others["batch_invariance"]
        compared, changed = (sum(row[key] for row in pairs) for key in ("compared", "other_answer"))
        parts += ["### The other methods of the literature", setting(others), OTHERS, arms_table(others)]
        parts += [f"Of {compared} answers that were also given at batch size 1, {changed} differ."]
    if tiny["versus"]:
        parts += [f"### {OURS} against the others at equal budget", versus_table(tiny)]
    if tiny["batch_invariance"]:
        parts += ["### Does the batch size change an answer?", batch_table(tiny)]
    parts += ["### How it was made", provenance(tiny)]
    parts += measured
    parts += _published(paper)
    return "\n\n".join(part for part in parts if part) + "\n"


def _published(paper: dict[str, Any]) -> list[str]:
    parts = [
        "## Published results, not run here",
        f"The figures below are those of {paper['source']}. None of them was measured here: they need a GPU and the "
        "real weights. The command below each table would reproduce it with this package.",
        "\n".join(f"- {line}" for line in paper["conditions"]),
    ]
    for each in paper["tables"]:
        words = sum(not cell.strip("~").replace(".", "").isdigit() for cell in each["rows"][0] if cell)
        parts += [
            f"### {each['title']}",
            table(each["columns"], each["rows"], left=words),
            f"{ORIGIN[each['origin']]} {each['note']}",
            f"**Not run here.** To reproduce:\n\n```\n{each['command']}\n```",
        ]
    return parts
