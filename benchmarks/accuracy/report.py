"""A one-page report of a run, as Markdown and as a self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

from . import UsageError
from .grid import FULL
from .plots import FIGURES, draw
from .summary import OURS, Summary

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
    """Markdown as one HTML page with its SVG figures inside.

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
    """The report.

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
    parts += ["## How it was made", provenance(summary)]
    return "\n\n".join(parts) + "\n"


NOTES = """Intervals are 95 %: Wilson's for accuracies (bootstrap over problems where a problem has several samples),
bootstrap over problems for the paired differences to full KV at the same batch size (10,000 resamples, seeded). *p* is
McNemar's exact test. *Cut off* is the share of answers that reached the limit of tokens. KV memory is counted, not
measured: tokens that a batch of requests holds at their peaks, on average, times the bytes of a token; the bound is
what the largest of them may hold, times the batch size."""


def setting(summary: Summary) -> str:
    """What was run, in words."""
    run, settings = summary["run"], summary["run"]["settings"]
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    length = run["full_mean_length"]
    full = f"; full KV writes {length:,.0f} tokens on average" if length else ""
    split = f" of the {settings['split']} split" if settings["split"] else ""
    config = settings["policy_config"]
    first = next((policy for policy in settings["policies"] if policy != FULL), "")
    parameters = f" `{first}` has {', '.join(f'{k} {v}' for k, v in config.items())}" if config else ""
    parameters += ", the others their defaults." if config else ""
    for policy, own in settings.get("own", {}).items():
        values = own.get("policy_config", {}) | {k: v for k, v in own.items() if k != "policy_config"}
        parameters += f" `{policy}` is served by itself, with {', '.join(f'{k} {v}' for k, v in values.items())}."
    return (
        f"{len(summary['problems'])} problems{split}, {settings['samples']} sample(s) each, {how}, at most "
        f"{settings['max_tokens']:,} tokens{full}. Buffer {settings['buffer']} tokens, window {settings['window']}, "
        f"granularity {settings['granularity']}, prompt {'protected' if settings['protect_prompt'] else 'evictable'}."
        + parameters
    )


def headline(summary: Summary) -> str:
    """The differences of `OURS` to full KV in words, one line per budget; empty without both."""
    size = summary["run"]["settings"]["batch_sizes"][0]
    lines = []
    for arm in summary["arms"]:
        plain = arm["policy"] == OURS and arm["batch_size"] == size and not arm.get("steering")
        if plain and "difference_to_full" in arm:
            d = arm["difference_to_full"]
            lines.append(
                f"- **{OURS} at {_budget(arm)}**: {100 * arm['accuracy']:.1f} % right, {_points(d)} points to full KV; "
                f"{arm['mean_length']:,.0f} tokens written, {100 * arm['truncated']:.1f} % cut off."
            )
    return "\n".join(lines)


def arms_table(summary: Summary) -> str:
    """All arms as a Markdown table, but for batch sizes at which only some problems were run."""
    arms = [arm for arm in summary["arms"] if len(arm["correct"]) == len(summary["problems"])]
    head: tuple[str, ...] = (
        "policy", "budget", "batch", "problems", "right, %", "to full KV, points", "p", "tokens written",
        "cut off, %", "compactions", "KV memory, MiB", "bound, MiB",
    )  # fmt: skip
    timed = any(arm["seconds"] for arm in arms)
    steered = any(arm.get("steering") for arm in arms)
    rows = []
    for arm in arms:
        low, high = arm["accuracy_interval"]
        difference = arm.get("difference_to_full")
        p = difference and difference["mcnemar_p"]
        rows.append(
            (
                arm["policy"],
                _budget(arm),
                arm["batch_size"],
                len(arm["correct"]),
                f"{100 * arm['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                _points(difference) if difference else "",
                "" if p is None else f"{p:.2g}",
                f"{arm['mean_length']:,.0f}",
                f"{100 * arm['truncated']:.1f}",
                f"{arm['compactions']:.1f}",
                f"{arm['peak_bytes'] / 2**20:,.1f}",
                f"{arm['bound_bytes'] / 2**20:,.1f}",
            )
            + ((arm.get("steering", ""), *_counts(arm)) if steered else ())
            + ((f"{60 * arm['samples'] / arm['seconds']:.1f}" if arm["seconds"] else "",) if timed else ())
        )
    head += ("steering", "tokens steered", "doubts") if steered else ()
    return table(head + (("answers a minute",) if timed else ()), rows, left=2)


def _counts(arm: Mapping[str, Any]) -> tuple[str, str]:
    if "steering" not in arm:
        return "", ""
    return f"{arm['steered_tokens']:.1f}", f"{arm['doubts']:.1f}"


def versus_table(summary: Summary) -> str:
    """`OURS` minus every other policy at equal budget and the first batch size."""
    head = ("other policy", "budget", f"{OURS} minus other, points", "p")
    rows = [
        (
            row["policy"],
            row["budget"],
            _points(row),
            "" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.2g}",
        )
        for row in summary["versus"]
    ]
    return table(head, rows, left=1)


def batch_table(summary: Summary) -> str:
    """What the batch size changed."""
    rows = summary["batch_invariance"]
    compared = sum(row["compared"] for row in rows)
    tokens, answers = (sum(row[key] for row in rows) for key in ("other_tokens", "other_answer"))
    text = (
        f"{compared:,} answers were generated at two batch sizes: {answers} have another answer, {tokens} differ in "
        "any token."
    )
    head = ("policy", "budget", "batch sizes", "compared", "other tokens", "other answer")
    cells = [
        (
            row["policy"],
            row["budget"] or "",
            " and ".join(map(str, row["batch_sizes"])),
            row["compared"],
            row["other_tokens"],
            row["other_answer"],
        )
        for row in rows
    ]
    return text + "\n\n" + table(head, cells, left=1)


def provenance(summary: Summary) -> str:
    """Command, commit, machine and versions."""
    run = summary["run"]
    machine = run["machine"]
    where = ", ".join(
        [f"{machine['cores']} cores of {machine['cpu']}", f"{machine['memory_gib']} GiB"] + machine["gpus"]
    )
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"```\n{command_line(run['command'])}\n```\n\n"
        f"Commit `{run['commit']}`, {run['date']}, {where}, {machine['processes']} process(es), "
        f"{run['seconds'] / 60:.1f} minutes. {packages}."
    )


def command_line(command: Iterable[str]) -> str:
    """A command as it would be typed."""
    import shlex

    return shlex.join(command)


def _budget(arm: Mapping[str, Any]) -> str:
    if arm["policy"] == FULL:
        return ""
    given = arm["budget_as_given"]
    return f"{arm['budget']} ({given})" if given.endswith("%") else str(arm["budget"])


def _points(difference: Mapping[str, Any]) -> str:
    """A difference of accuracies in percentage points, with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * difference[key] for key in ("value", "low", "high")))


def print_table(summary: Summary, echo: Callable[[str], None]) -> None:
    """The figures of all arms for a terminal."""
    widths = {"policy": 14, "budget": 12, "batch": 6, "right": 8, "to full": 9, "tokens": 8, "cut off": 9}
    head = "".join(name.ljust(w) if name == "policy" else name.rjust(w) for name, w in widths.items()) + "  compactions"
    echo(f"{head}\n{'-' * len(head)}")
    for arm in summary["arms"]:
        if arm.get("steering"):
            echo(f"steered by {arm['steering']}:")
        difference = arm.get("difference_to_full")
        points = f"{100 * difference['value']:+.1f}" if difference else ""
        echo(
            f"{arm['policy']:14}{_budget(arm):>12}{arm['batch_size']:>6}{arm['accuracy']:>8.1%}{points:>9}"
            f"{arm['mean_length']:>8,.0f}{arm['truncated']:>9.1%}{arm['compactions']:>13.1f}"
        )
