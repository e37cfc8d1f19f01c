"""A one-page report of a run, as Markdown and as a self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.results.arms import (
    NOTES,
    arms_table,
    batch_table,
    budget_of,
    headline,
    setting,
    versus_table,
)
from benchmarks.results.plots.accuracy import FIGURES, draw
from benchmarks.results.provenance import how_it_was_made
from benchmarks.results.store import Summary
from skipkv_vllm.evaluation.figures import OURS

from . import UsageError

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left }
th { border-bottom: 2px solid #bbb } td[style*=right] { white-space: nowrap }
img { max-width: 100%; margin: .5rem 0 } code { background: #f4f4f4; padding: .1rem .3rem; font-size: 13px }
pre code { display: block; padding: .7rem; overflow-x: auto }
"""


def write_report(summary: Summary, folder: Path) -> Path:
    """Write `report.md`, `report.html`, `summary.json` and the figures into a folder.

    Returns:
        The HTML file.
    """
    figures = draw(summary, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = markdown(summary, figures)
    (folder / "report.md").write_text(text)
    page = folder / "report.html"
    page.write_text(html(text, folder))
    return page


def html(text: str, folder: Path) -> str:
    """Render Markdown as one HTML page with its SVG figures inside.

    Args:
        text: Markdown.
        folder: where its figures are.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise UsageError("the HTML report needs markdown-it-py: pip install 'skipkv-vllm[eval]'") from None
    body = MarkdownIt("commonmark").enable("table").render(text)
    for name in sorted({part.split('"')[0] for part in body.split('<img src="')[1:]}):
        svg = (folder / name).read_text()
        picture = svg[svg.index("<svg") :]
        start = body.index(f'<img src="{name}"')
        body = body[:start] + picture + body[body.index(">", start) + 1 :]
    title = text.partition("\n")[0].lstrip("# ")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def markdown(summary: Summary, figures: Mapping[str, str]) -> str:
    """Write the report.

    Args:
        summary: see `summary.summarise`.
        figures: name -> file, relative to the report.
    """
    settings = summary["run"]["settings"]
    title = f"# Accuracy of {Path(settings['model']).name} on {settings['data']} by KV budget"
    parts = [title, setting(summary), headline(summary)]
    parts += [f"![{FIGURES[name]}]({file})" for name, file in figures.items()]
    parts += ["## All figures", arms_table(summary), NOTES]
    if summary["versus"]:
        parts += [f"## {OURS} against the others at equal budget", versus_table(summary)]
    if summary["batch_invariance"]:
        parts += ["## Does the batch size change an answer?", batch_table(summary)]
    parts += ["## How it was made", how_it_was_made(summary["run"])]
    return "\n\n".join(parts) + "\n"


def print_table(summary: Summary, echo: Callable[[str], None]) -> None:
    """Print the figures of all arms for a terminal."""
    widths = {"policy": 14, "budget": 12, "batch": 6, "right": 8, "to full": 9, "tokens": 8, "cut off": 9}
    head = "".join(name.ljust(w) if name == "policy" else name.rjust(w) for name, w in widths.items()) + "  compactions"
    echo(f"{head}\n{'-' * len(head)}")
    for arm in summary["arms"]:
        if arm.get("steering"):
            echo(f"steered by {arm['steering']}:")
        difference = arm.get("difference_to_full")
        points = f"{100 * difference['value']:+.1f}" if difference else ""
        echo(
            f"{arm['policy']:14}{budget_of(arm):>12}{arm['batch_size']:>6}{arm['accuracy']:>8.1%}{points:>9}"
            f"{arm['mean_length']:>8,.0f}{arm['truncated']:>9.1%}{arm['compactions']:>13.1f}"
        )
