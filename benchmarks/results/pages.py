"""The pages, the sections that are registered for each, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from skipkv_vllm import KVPolicyError

from . import store
from .sections import (
    accuracy,
    cost,
    fidelity,
    operators,
    published,
    simulation,
    speculation,
    steering,
    throughput,
    unequal_budgets,
)
from .sections.summary import summary_sections
from .store import DOCS, PAPER, RESULTS, Summary, read_summary, write_summary

HEADER = "Written by `python -m benchmarks.results` from the JSON files in `docs/results/`; do not edit."


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        write: turns the summaries into paragraphs of Markdown.
        names: summaries, relative to the documentation. A section without all of them is left out.
    """

    write: Callable[..., list[str]]
    names: tuple[Path, ...]


class Page(NamedTuple):
    """A page of `docs/results/`; one without any section is not written."""

    title: str
    sections: tuple[Section, ...]


PAGES = {
    "accuracy": Page(
        "Accuracy",
        (
            Section(accuracy.accuracy_section, (store.TINY,)),
            Section(steering.steering_section, (store.STEERING,)),
            Section(steering.layer_section, (store.SWEEP,)),
            Section(unequal_budgets.unequal_section, (store.UNEQUAL,)),
            Section(unequal_budgets.again_section, (store.UNEQUAL_AGAIN,)),
        ),
    ),
    "fidelity": Page(
        "Fidelity and recall",
        (
            Section(fidelity.fidelity_section, (store.FIDELITY,)),
            Section(fidelity.other_texts_section, (store.FIDELITY, store.OTHER_TEXTS)),
            Section(fidelity.windowed_section, (store.WINDOWED_FIDELITY,)),
            Section(fidelity.recall_section, (store.RECALL,)),
        ),
    ),
    "cost": Page(
        "Cost",
        (
            Section(cost.overhead_section, (store.OVERHEAD,)),
            Section(cost.overhead_section, (store.LARGER_OVERHEAD,)),
            Section(cost.steering_overhead_section, (store.STEERING_OVERHEAD,)),
            Section(operators.operators_section, (store.OPERATORS,)),
            Section(operators.operators_section, (store.OPERATORS_ON_GPU,)),
            Section(cost.prefix_cache_section, (store.PREFIX_CACHE,)),
        ),
    ),
    "throughput": Page(
        "Throughput",
        (
            Section(throughput.throughput_section, (store.THROUGHPUT,)),
            Section(speculation.speculation_section, (store.SPECULATION,)),
            Section(speculation.acceptance_section, (store.ACCEPTANCE,)),
            Section(speculation.acceptance_section, (store.REAL_ACCEPTANCE,)),
            Section(simulation.simulation_section, (store.SIMULATION,)),
        ),
    ),
    "published": Page("Published results, not run here", (Section(published.published_section, (PAPER,)),)),
}
"""Name of a page -> its contents, in order. A benchmark adds its section here."""

NAMES = tuple(dict.fromkeys(name for page in PAGES.values() for section in page.sections for name in section.names))


def write_pages(docs: Path) -> list[Path]:
    """Write every page for which there are summaries.

    Args:
        docs: the documentation; summaries and pages are in its folder `results`.

    Returns:
        The pages.

    Raises:
        KVPolicyError: the folder has no summaries.
    """
    written = []
    for name, text in render_pages(docs).items():
        path = docs / RESULTS / f"{name}.md"
        path.write_text(text)
        written.append(path)
    return written


def render_pages(docs: Path) -> dict[str, str]:
    """Name of a page -> its text; see `write_pages`."""
    found = {name: read_summary(docs / name) for name in NAMES if (docs / name).exists()}
    if not found.keys() - {PAPER}:
        raise KVPolicyError(f"{docs / RESULTS} has no results; `make eval-tiny` writes the first")
    pages = {
        "summary": _render(
            "Results in short",
            ("The linked pages name the command and the commit that made the figures.", *summary_sections(found)),
        )
    }
    for name, page in PAGES.items():
        parts = []
        for section in page.sections:
            if all(each in found for each in section.names):
                parts += section.write(*(found[each] for each in section.names))
        if parts:
            pages[name] = _render(page.title, parts)
    return pages


def _render(title: str, parts: Sequence[str]) -> str:
    return "\n\n".join((f"# {title}", HEADER, *parts)) + "\n"


def publish(figures: Summary, out: Path, docs: Path = DOCS) -> None:
    """Write a summary, and the pages again if it is one of theirs.

    Args:
        figures: the summary.
        out: its file.
        docs: the documentation.
    """
    write_summary(figures, out)
    print(f"wrote {out}")
    if out.resolve() in [(docs / name).resolve() for name in NAMES]:
        for page in write_pages(docs):
            print(f"wrote {page}")
