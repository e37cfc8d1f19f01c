"""Speculative decoding beside eviction: throughput, and the share of drafts that is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..markdown import counted, milliseconds, table
from ..provenance import made_by

NEAR = 0.02
"""Acceptance with eviction may be this far from that of full KV."""
FORMS = {
    "own": "the own answer of each, in the engine",
    "replayed": "the same answers, from their tokens alone",
    "full": "the answer of full KV, given to both",
    "source": "the text that the prompt was cut from, given to both",
}
"""Rows of a table of acceptance, in order."""


def speculation_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about throughput.

    Args:
        figures: what `python -m benchmarks.throughput --speculation` wrote.
    """
    run, load, settings = figures["run"], figures["load"], figures["run"]["settings"]
    turns = "Each engine has all its rounds in a row" if settings["one_by_one"] else "Engines take turns"
    return [
        "## Speculative decoding beside eviction, measured here",
        f"{load['requests']} requests with {load['output_tokens']:,} output tokens arrive at the start, at equal "
        f"memory for KV: a pool of 1 holds all of them at their full length ({load['pages']:,} blocks of "
        f"{settings['block_size']} tokens). The policy is `{settings['policy']}` with a budget of "
        f"{settings['budget']} and a buffer of {settings['buffer']}; the model is `{settings['model']}` in "
        f"{settings['dtype']}. *n-gram* drafts up to 4 tokens that followed the last 2 to 4 earlier in the text. "
        "Scheduling is synchronous in all engines, because vLLM has no asynchronous scheduling for its search of "
        f"n-grams on the host. {turns}; rates are medians of {settings['rounds']} rounds, and ratios are medians of "
        "the rounds' ratios.",
        speculation_table(figures["speculation"]),
        made_by(run),
    ]


def speculation_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per engine and pool."""
    head = (
        "pool", "engine", "tokens/s", "of the same engine without drafts", "of full KV, drafts alike",
        "of full KV without drafts", "drafts accepted", "draft tokens", "steps", "step, ms", "with compaction, ms",
        "at once", "preemptions", "compactions",
    )  # fmt: skip
    lines = []
    for row in rows:
        ratios = [f"{row[key]:.2f}" for key in ("of_plain", "of_full_alike", "of_full")]
        drafts = ["", ""] if row["acceptance"] is None else [f"{row['acceptance']:.1%}", f"{row['drafts']:,}"]
        times = [milliseconds(row[key]) for key in ("step_ms", "compaction_step_ms")]
        counts = [f"{row[key]:,}" for key in ("peak_running", "preemptions", "compactions")]
        rate, steps = f"{row['tokens_per_second']:,.0f}", f"{row['steps']:,}"
        lines.append([f"{row['pool']:g}", row["arm"], rate, *ratios, *drafts, steps, *times, *counts])
    return table(head, lines)


def acceptance_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section about the acceptance of a model.

    Args:
        figures: what `python -m benchmarks.acceptance` wrote.
    """
    run, settings = figures["run"], figures["run"]["settings"]
    return [
        f"## Accepted drafts with and without eviction: `{settings['model']}`",
        f"The first half of {counted(settings['texts'], 'repetitive text')} of {settings['length']} tokens (kind "
        f"*{settings['kind']}*) is the prompt, and the model goes on greedily to that length. `{settings['policy']}` "
        f"has a budget of {figures['budget']} tokens and a buffer of {settings['buffer']}, prompts are not protected, "
        f"and a text is compacted {figures['compactions']:.1f} times. Drafts come from n-grams, as above. A draft is "
        "accepted if it is the token that the model chooses, so with greedy decoding the text alone decides. The "
        "second row drafts for the finished answers again. It differs from the first by the drafts that an engine "
        "leaves out, and by those of the last step, which may reach behind the end. In the last two rows both have the "
        "same text and the same drafts, several for each of its places. The share there is of drafts that the model "
        "would have accepted. Intervals are over texts.",
        acceptance_table(figures["rows"]),
        finding(figures["rows"]),
        made_by(run),
    ]


def acceptance_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per kind of text."""
    head = ("text", "full KV", "with eviction", "difference, points", "95 % interval", "accepted of drafted")
    lines = []
    for row in rows:
        value, low, high = (100 * each for each in row["difference"])
        drafts = " / ".join(f"{accepted:,} of {verified:,}" for verified, accepted in row["drafts"])
        shares = [f"{accepted / verified:.1%}" for verified, accepted in row["drafts"]]
        lines.append([FORMS[row["text"]], *shares, f"{value:+.1f}", f"{low:+.1f} to {high:+.1f}", drafts])
    return table(head, lines, left=1)


def finding(rows: Iterable[Mapping[str, Any]]) -> str:
    """State how far acceptance with eviction is from that of full KV, and where the difference comes from.

    Args:
        rows: of a table of acceptance.
    """
    differences = {row["text"]: row["difference"] for row in rows}
    own, low, high = differences["own"]
    replayed, source, full = (100 * differences[text][0] for text in ("replayed", "source", "full"))
    if abs(own) <= NEAR:
        certain = "" if max(abs(low), abs(high)) <= NEAR else "; the interval reaches further"
        start = f"Acceptance with eviction is within 2 points of that without: {100 * own:+.1f} points{certain}."
    else:
        start = f"Acceptance with eviction is more than 2 points from that without: {100 * own:+.1f} points."
    return (
        f"{start} Of these, {100 * own - replayed:+.1f} come from the drafts that the engine leaves out before a "
        "compaction and where queries are accumulated, and from the ends of texts. What is left out are the last "
        f"drafts of a step, which are rejected most often. Other texts account for {replayed:+.1f}. On given texts, "
        f"where every draft is judged, the difference is {full:+.1f} (the answer of full KV) and "
        f"{source:+.1f} points (the text of the prompt)."
    )
