"""Text and tables of an accuracy run, for its report and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipkv_vllm.evaluation.figures import FULL, OURS

from .markdown import table
from .store import Summary

NOTES = (
    "Intervals are 95 %: Wilson's for accuracies (a bootstrap over problems where a problem has several samples), "
    "and a bootstrap over problems for the paired differences to full KV at the same batch size (10,000 resamples, "
    "seeded). *p* is McNemar's exact test. *Cut off* is the share of answers that reached the token limit. KV memory "
    "is counted, not measured: the mean number of tokens that a batch of requests holds at their peaks, times the "
    "bytes of a token. The bound is what the largest request may hold, times the batch size."
)


def find(summary: Summary, policy: str, budget: int, batch_size: int, steering: str = "") -> dict[str, Any] | None:
    """The figures of an arm, None where it was not run."""
    wanted = (policy, budget, batch_size, steering)
    return next((arm for arm in summary["arms"] if _key(arm) == wanted), None)


def _key(arm: Mapping[str, Any]) -> tuple[str, int, int, str]:
    return arm["policy"], arm["budget"], arm["batch_size"], arm.get("steering", "")


def setting(summary: Summary) -> str:
    """Describe what was run."""
    run, settings = summary["run"], summary["run"]["settings"]
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    length = run["full_mean_length"]
    full = f" Full KV writes {length:,.0f} tokens on average." if length else ""
    split = f" of the {settings['split']} split" if settings["split"] else ""
    samples = "one sample" if settings["samples"] == 1 else f"{settings['samples']} samples"
    config = settings["policy_config"]
    first = next((policy for policy in settings["policies"] if policy != FULL), "")
    parameters = f" `{first}` runs with {_listed(config)}; the others run with their defaults." if config else ""
    for policy, own in settings.get("own", {}).items():
        values = own.get("policy_config", {}) | {k: v for k, v in own.items() if k != "policy_config"}
        parameters += f" `{policy}` has a server of its own, with {_listed(values)}."
    return (
        f"{len(summary['problems'])} problems{split}, {samples} each, {how}, at most {settings['max_tokens']:,} tokens."
        f"{full} Buffer {settings['buffer']} tokens, window {settings['window']}, granularity "
        f"{settings['granularity']}, prompt {'protected' if settings['protect_prompt'] else 'not protected'}."
        + parameters
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}` {value}" for key, value in values.items())


def headline(summary: Summary) -> str:
    """State the difference of `OURS` to full KV, a line per budget; empty without both."""
    lines = []
    for arm in plain_arms(summary, OURS):
        if difference := arm.get("difference_to_full"):
            lines.append(
                f"- **{OURS} at {budget_of(arm)}**: {100 * arm['accuracy']:.1f} % right, {points(difference)} points "
                f"against full KV; {arm['mean_length']:,.0f} tokens written, {100 * arm['truncated']:.1f} % cut off."
            )
    return "\n".join(lines)


def plain_arms(summary: Summary, policy: str) -> list[dict[str, Any]]:
    """The arms of a policy that are not steered, at the first batch size."""
    size = summary["run"]["settings"]["batch_sizes"][0]
    return [
        arm
        for arm in summary["arms"]
        if arm["policy"] == policy and arm["batch_size"] == size and not arm.get("steering")
    ]


def arms_table(summary: Summary) -> str:
    """All arms, except those of batch sizes at which only some problems were run."""
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
                budget_of(arm),
                arm["batch_size"],
                len(arm["correct"]),
                f"{100 * arm['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                points(difference) if difference else "",
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
            points(row),
            "" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.2g}",
        )
        for row in summary["versus"]
    ]
    return table(head, rows, left=1)


def batch_table(summary: Summary) -> str:
    """The answers that changed with the batch size."""
    rows = summary["batch_invariance"]
    compared, tokens, answers = (sum(row[key] for row in rows) for key in ("compared", "other_tokens", "other_answer"))
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


def budget_of(arm: Mapping[str, Any]) -> str:
    """The budget of an arm in tokens, and the share it was given as; empty for full KV."""
    if arm["policy"] == FULL:
        return ""
    given = arm["budget_as_given"]
    return f"{arm['budget']} ({given})" if given.endswith("%") else str(arm["budget"])


def points(difference: Mapping[str, Any]) -> str:
    """A difference of accuracies in percentage points, with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * difference[key] for key in ("value", "low", "high")))
