"""From samples to figures: one JSON document, the only source of plots, reports and pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.results.store import Summary
from skipkv_vllm.evaluation.figures import FULL, OURS
from skipkv_vllm.evaluation.stats import bootstrap_mean, mcnemar, paired_difference, wilson

from .grid import Arm, Settings, Steer
from .run import load
from .samples import Sample


def read_run(out: Path) -> Summary:
    """Summarise a finished run; see `summarise`.

    Args:
        out: its folder.
    """
    return summarise(*load(out))


def summarise(settings: Settings, info: Mapping[str, Any], samples: Sequence[Sample]) -> Summary:
    """Compute all figures of a run.

    Args:
        settings, info, samples: as `run.load` returns them.

    Returns:
        Plain JSON: `run` (what ran where), `arms`, `versus` (`OURS` against the others at equal budget and the
        first batch size) and `batch_invariance`. Rates are shares of 1, lengths in tokens, memory in bytes.
        `correct` and `lengths` of an arm are sums over the samples of each problem, in the order of `problems`.
    """
    by_arm: dict[Arm, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_arm[sample.arm].append(sample)
    budgets = {tokens: text for text, tokens in info["budgets"].items()}
    wanted = [
        arm
        for size in settings.batch_sizes
        for arm in [Arm(FULL, 0, size)] * (FULL in settings.policies) + settings.arms(size, list(budgets))
    ]
    problems = _problems(by_arm[wanted[0]])
    per_token = info["kv_bytes_per_token"]
    arms = []
    for arm in wanted:
        full = by_arm.get(Arm(FULL, 0, arm.batch_size)) if FULL in settings.policies else None
        figures = _arm(arm, by_arm[arm], settings, per_token)
        figures["budget_as_given"] = budgets.get(arm.budget)
        figures["seconds"] = info["arm_seconds"].get(str(arm))
        if full and arm != Arm(FULL, 0, arm.batch_size):
            figures["difference_to_full"] = _difference(by_arm[arm], full)
            figures["length_to_full"] = _length_difference(by_arm[arm], full)
        arms.append(figures)
    keys = ("command", "commit", "date", "machine", "versions", "settings", "sessions", "budgets")
    return {
        "run": {key: info[key] for key in keys}
        | {
            "full_mean_length": info.get("full_mean_length"),
            "kv_bytes_per_token": per_token,
            "seconds": round(sum(session["seconds"] for session in info["sessions"]), 1),
        },
        "problems": problems,
        "arms": arms,
        "versus": _versus(settings, by_arm, list(budgets)),
        "batch_invariance": _batch_invariance(settings, by_arm, list(budgets)),
    }


def peak_tokens(sample: Sample, settings: Settings) -> int:
    """Return the most KV tokens that the request held: all of its tokens, or its bound once it was compacted."""
    total = sample.prompt_tokens + sample.completion_tokens
    if not sample.compactions:
        return total
    return min(total, settings.limits(sample.policy, sample.budget, sample.prompt_tokens).bound)


def _arm(arm: Arm, samples: Sequence[Sample], settings: Settings, per_token: int) -> dict[str, Any]:
    right, total = sum(s.correct for s in samples), len(samples)
    per_problem = _grouped(samples)
    accuracies = [mean(s.correct for s in group) for group in per_problem]
    # Samples of one problem are not independent, so Wilson's interval holds for one sample per problem only.
    interval = wilson(right, total) if settings.samples == 1 else bootstrap_mean(accuracies)
    peaks = [peak_tokens(s, settings) for s in samples]
    return {
        "policy": arm.policy,
        "budget": arm.budget,
        "batch_size": arm.batch_size,
        **(_steering(arm, samples) if arm.steering else {}),
        "samples": total,
        "accuracy": right / total,
        "accuracy_interval": interval,
        "mean_length": mean(s.completion_tokens for s in samples),
        "length_interval": bootstrap_mean([mean(s.completion_tokens for s in group) for group in per_problem]),
        "truncated": sum(s.is_truncated for s in samples) / total,
        "compactions": mean(s.compactions for s in samples),
        "evicted_tokens": mean(s.evicted_tokens for s in samples),
        "mean_peak_tokens": mean(peaks),
        "peak_bytes": round(arm.batch_size * mean(peaks) * per_token),
        "bound_bytes": round(arm.batch_size * max(peaks) * per_token),
        "correct": [sum(s.correct for s in group) for group in per_problem],
        "lengths": [sum(s.completion_tokens for s in group) for group in per_problem],
    }


def _steering(arm: Arm, samples: Sequence[Sample]) -> dict[str, Any]:
    """The way an arm is steered, and its counts."""
    return {
        "steering": arm.steering,
        **Steer.parse(arm.steering)._asdict(),
        "policy": arm.policy,
        "steered_tokens": mean(s.steered_tokens for s in samples),
        "doubts": mean(s.reflection + s.transition for s in samples),
    }


def _problems(samples: Sequence[Sample]) -> list[str]:
    return sorted({s.problem for s in samples}, key=_natural)


def _natural(name: str) -> tuple[str, int]:
    head, _, number = name.rpartition("-")
    return head, int(number)


def _grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each problem, in the order of problems."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda s: (_natural(s.problem), s.number)):
        groups[sample.problem].append(sample)
    return list(groups.values())


def _difference(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, Any]:
    """Return the paired difference in accuracy over the problems of both."""
    a, b = ([mean(s.correct for s in group) for group in _grouped(samples)] for samples in (ours, theirs))
    value, low, high = paired_difference(a, b)
    one_each = len(a) == len(ours) and len(b) == len(theirs)
    p = mcnemar([s[0].correct for s in _grouped(ours)], [s[0].correct for s in _grouped(theirs)]) if one_each else None
    return {"value": value, "low": low, "high": high, "mcnemar_p": p}


def _length_difference(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, float]:
    a, b = ([mean(s.completion_tokens for s in group) for group in _grouped(samples)] for samples in (ours, theirs))
    return paired_difference(a, b)._asdict()


def _versus(settings: Settings, by_arm: Mapping[Arm, list[Sample]], budgets: Sequence[int]) -> list[dict[str, Any]]:
    if OURS not in settings.policies:
        return []
    size = settings.batch_sizes[0]
    return [
        {"policy": other, "budget": budget}
        | _difference(by_arm[Arm(OURS, budget, size)], by_arm[Arm(other, budget, size)])
        for budget in budgets
        for other in settings.evicting
        if other != OURS
    ]


def _batch_invariance(
    settings: Settings, by_arm: Mapping[Arm, list[Sample]], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Count, for every arm and every further batch size, the changes against the first batch size."""
    first, *others = settings.batch_sizes
    cells = [(FULL, 0)] * (FULL in settings.policies) + [(p, b) for b in budgets for p in settings.evicting]
    rows = []
    for policy, budget in cells:
        known = {(s.problem, s.number): s for s in by_arm[Arm(policy, budget, first)]}
        for size in others:
            pairs = [
                (known[s.problem, s.number], s)
                for s in by_arm[Arm(policy, budget, size)]
                if (s.problem, s.number) in known
            ]
            rows.append(
                {
                    "policy": policy,
                    "budget": budget,
                    "batch_sizes": [first, size],
                    "compared": len(pairs),
                    "other_tokens": sum(a.tokens_digest != b.tokens_digest for a, b in pairs),
                    "other_answer": sum((a.answer, a.correct) != (b.answer, b.correct) for a, b in pairs),
                }
            )
    return rows


def changed_answers(summary: Summary) -> list[str]:
    """Name the arms whose answers changed with the batch size, a line each."""
    return [
        f"{row['policy']} {row['budget'] or ''}: {row['other_answer']} of {row['compared']} answers differ between "
        f"batch sizes {' and '.join(map(str, row['batch_sizes']))}"
        for row in summary["batch_invariance"]
        if row["other_answer"]
    ]
