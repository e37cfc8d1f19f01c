"""Tables, plot and files of a fidelity run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import LOOK, RULE, draw_line, label_lines, pyplot, save, title

HEAD = ("method", "budget", "excess, nats", "95 % interval", "same top token", "divergence", "compactions")


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows under `HEAD`, by ascending excess within each budget."""
    return [cells(row) for row in sorted(report["rows"], key=lambda row: (-row["budget"], row["excess"]))]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row's cells under `HEAD`."""
    return (
        row["method"],
        str(row["budget"]),
        f"{row['excess']:.4f}",
        "{:.4f} to {:.4f}".format(*row["excess_interval"]),
        f"{row['agreement']:.1%}",
        f"{row['divergence']:.4f}",
        f"{row['compactions']:.1f}",
    )


def terminal_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a table for a terminal; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def describe(report: Mapping[str, Any]) -> str:
    """Format the whole report for a terminal."""
    settings = report["settings"]
    parts = [
        f"{settings['texts']} texts of {settings['length']} tokens, full KV {report['full_nll']:.4f} nats per token; "
        f"buffer {settings['buffer']}, window {settings['window']}, granularity {settings['granularity']}",
        terminal_table(HEAD, rows_of(report)),
    ]
    sources = list(report["rows"][0]["by_source"])
    if 1 < len(sources) <= 8:
        rows = [
            (row["method"], str(row["budget"]), *(f"{row['by_source'][source]:.4f}" for source in sources))
            for row in report["rows"]
        ]
        parts += ["Excess by source:", terminal_table(("method", "budget", *sources), rows)]
    return "\n\n".join(parts)


def write(report: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write a report as `stem.json`, one line per method and budget, and its plot as `stem.svg` and `stem.png`.

    Returns:
        The files to show to the user.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    others = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in report.items() if key != "rows")
    path = stem.with_suffix(".json")
    path.write_text(f'{{\n{others} "rows": [\n  {rows}\n ]\n}}\n')
    draw(report, stem)
    return [path, stem.with_suffix(".svg")]


def draw(report: Mapping[str, Any], stem: Path) -> None:
    """Plot excess against budget, one line per method, with the limit (`max_excess`) and the chosen row, if any."""
    plt, settings = pyplot(), report["settings"]
    budgets = sorted({row["budget"] for row in report["rows"]})
    with plt.rc_context(LOOK):
        canvas, axes = plt.subplots(figsize=(6.6, 4.1), layout="constrained")
        ends = {}
        for method in settings["methods"]:
            line = sorted((row for row in report["rows"] if row["method"] == method), key=lambda row: row["budget"])
            x, y = [row["budget"] for row in line], [row["excess"] for row in line]
            low, high = zip(*(row["excess_interval"] for row in line), strict=True)
            draw_line(axes, method, x, y, low, high)
            ends[method] = y[-1]
        if limit := settings.get("max_excess"):
            axes.axhline(limit, color=RULE, linestyle=":", linewidth=1.2, zorder=1)
            axes.annotate(
                f"limit {limit:g}", (0, limit), (2, 2), ("axes fraction", "data"), "offset points", color=RULE
            )
        if chosen := report.get("chosen"):
            axes.plot(chosen["budget"], chosen["excess"], "o", markersize=14, markerfacecolor="none", color=RULE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("KV budget, tokens")
        axes.set_ylabel("excess, nats per token")
        label_lines(axes, ends)
        model = Path(settings["model"]).name
        title(
            axes,
            "Cost of eviction in prediction",
            f"{model}, {settings['texts']} texts of {settings['length']} tokens",
        )
        save(canvas, stem)
        plt.close(canvas)
