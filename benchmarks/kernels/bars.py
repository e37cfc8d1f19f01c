"""The figures that a run must reach at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .bench import Row, Settings

Bars = dict[str, tuple[float, bool]]
"""Text -> figure, and whether it reaches the bar."""

BARS = {
    "scoring at L = 2176 is at least 8 times as fast as R-KV style": 8.0,
    "scoring of distinct keys does at least half of a matmul's GFLOP/s": 0.5,
    "no head moves more tokens than the buffer has": 1.0,
    "compaction at B = 1024 is at least 5 times as fast as a rewrite": 5.0,
}

GPU_BARS = {
    "one request of 2176 similar keys is scored in at most this many ms": 0.7,
    "one request of 2176 distinct keys is scored in at most this many ms": 3.0,
    "the queries of 128 requests and all layers are recorded in at most this many ms": 0.12,
    "a call takes at most this share of the memory of its formula": 1.1,
}
"""Times are those of `SHAPE` on a GPU of the H100's class, where a step of 128 requests takes about 17 ms."""

SHAPE = {"layers": 36, "heads": 8, "query_heads": 32, "dim": 128, "dtype": "bfloat16"}

MOST_IMPORTANT_LENGTH, MOST_IMPORTANT_TOKENS = 2176, 128
"""Sizes that bars are about."""

NO_MORE_TOKENS = list(BARS)[2]


def check_bars(kind: str, settings: Settings, figures: Mapping[str, Sequence[Row]]) -> Bars:
    """Check the bars that apply to a device and these sizes."""
    return _on_cpu(figures) if kind == "cpu" else _on_gpu(settings, figures)


def _on_cpu(figures: Mapping[str, Sequence[Row]]) -> Bars:
    scoring, compaction = figures["scoring"], figures["compaction"]
    fast, machine_share, _, cheap = BARS
    found: Bars = {}
    at_2176 = [row["speedup_over_rkv"] for row in scoring if row["length"] == MOST_IMPORTANT_LENGTH]
    if at_2176:
        found[fast] = (min(at_2176), min(at_2176) >= BARS[fast])
    shares = [row["of_matmul"] for row in scoring if "of_matmul" in row]
    found[machine_share] = (min(shares), min(shares) >= BARS[machine_share])
    found |= _moved(compaction)
    at_1024 = [row["speedup_over_rewrite"] for row in compaction if row["budget"] == 1024]
    if at_1024:
        found[cheap] = (min(at_1024), min(at_1024) >= BARS[cheap])
    return found


def _on_gpu(settings: Settings, figures: Mapping[str, Sequence[Row]]) -> Bars:
    found = _moved(figures["compaction"])
    similar, distinct, recorded, memory = GPU_BARS
    if all(getattr(settings, name) == value for name, value in SHAPE.items()):
        for text, keys in ((similar, "similar"), (distinct, "distinct")):
            for row in figures["scoring"]:
                if (row["length"], row["requests"], row["keys"]) == (MOST_IMPORTANT_LENGTH, 1, keys):
                    found[text] = (row["ours_ms"], row["ours_ms"] <= GPU_BARS[text])
        for row in figures["steps"]:
            if row["tokens"] == MOST_IMPORTANT_TOKENS and row["operator"].startswith("recorded queries"):
                found[recorded] = (row["ours_ms"], row["ours_ms"] <= GPU_BARS[recorded])
    shares = [
        row["ours_peak_bytes"] / row["formula_bytes"]
        for row in figures["scoring"]
        if row["formula_bytes"] and row["ours_peak_bytes"] is not None
    ]
    shares += [row["error_peak_bytes"] / row["error_formula_bytes"] for row in figures["measuring"]]
    if shares:
        found[memory] = (max(shares), max(shares) <= GPU_BARS[memory])
    return found


def _moved(compaction: Sequence[Row]) -> Bars:
    if not compaction:
        return {}
    moved = max(row["most_moved_per_head"] / row["buffer"] for row in compaction)
    return {NO_MORE_TOKENS: (moved, moved <= BARS[NO_MORE_TOKENS])}
