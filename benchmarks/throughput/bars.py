"""The figures that a run must reach at least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.load.arms import PRODUCTION, SAME

from .measure import Row

BARS = {
    "same pool of at most 10 %: the policy over the faster full KV": ("same_pool", 2.5),
    "pool of at most 10 %: the policy over full KV with the largest pool": ("small_over_full", 0.85),
    "largest pool: the policy over full KV": ("ample", 0.98),
    "grouping over no grouping": ("grouping", 0.99),
}


def check_bars(pools: Iterable[Row], grouping: Sequence[Row]) -> dict[str, tuple[float, bool]]:
    """Check the bars that apply to these runs: each with its figure, and whether the figure reaches it."""
    rows = list(pools)
    found: dict[str, float] = {}
    policy = [row for row in rows if row["arm"] not in (PRODUCTION, SAME)]
    small = [row for row in policy if row["pool"] <= 0.1]
    largest = max(row["pool"] for row in rows)
    if small:
        found["same_pool"] = min(min(row["of_same"], row["of_production"]) for row in small)
    if small and largest >= 1:
        found["small_over_full"] = min(row["of_full_at_largest"] for row in small)
    if largest >= 1:
        found["ample"] = min(row["of_same"] for row in policy if row["pool"] == largest)
    if grouping:
        found["grouping"] = min(row["of_ungrouped"] for row in grouping)
    bars = {text: (found[key], found[key] >= bar) for text, (key, bar) in BARS.items() if key in found}
    preemptions = sum(row["preemptions"] for row in [*policy, *grouping])
    bars["preemptions of the policy: none"] = (preemptions, preemptions == 0)
    for row in grouping:
        if row["bound"] is not None:
            late = row["longest_overtaken"]
            bars[f"overtaken at most {row['bound']:g} s past the turn"] = (late, late < row["bound"] or late == 0)
    return bars
