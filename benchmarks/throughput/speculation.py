"""Speculative decoding beside eviction: full KV and the policy, each with and without drafts, at equal memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load.arms import SAME, SPECULATIVE, Arm, engine_arguments
from benchmarks.load.drafts import DRAFT_ROOM
from benchmarks.load.engine import Order
from benchmarks.load.lengths import Offered, pages_needed

from .measure import Row, in_turns, ratio, row_of


def measure_speculation(args: argparse.Namespace, load: Sequence[Offered], logs: Path) -> list[Row]:
    """Measure the four engines over all pools: a row for each, with its ratios to the others of its pool.

    Scheduling is synchronous in all of them, because vLLM's search for n-grams on the host has no other.
    """
    needed = pages_needed(load, args.block_size)
    arms = [
        Arm(name + drafts, pool) for pool in args.pools for name in (SAME, args.policy) for drafts in ("", SPECULATIVE)
    ]
    longest = max(each.length for each in load)
    alike = {"async_scheduling": False, "max_model_len": longest + DRAFT_ROOM}
    runs = in_turns(
        {arm: engine_arguments(args, arm, load, int(arm.pool * needed)) | alike for arm in arms},
        [Order(load, not args.natural_stop)],
        args.rounds,
        logs,
        one_by_one=args.one_by_one,
    )
    rows = []
    for arm, rounds in runs.items():
        drafts = rounds[-1][0].drafts
        counts = {"drafts": drafts.verified, "accepted": drafts.accepted, "acceptance": drafts.share}
        rows.append(row_of(arm, [round_[0] for round_ in rounds]) | counts)
    by_arm = {(row["arm"], row["pool"]): row for row in rows}
    for row in rows:
        plain = row["arm"].removesuffix(SPECULATIVE)
        suffix = row["arm"].removeprefix(plain)
        row["of_plain"] = ratio(row, by_arm[plain, row["pool"]])
        row["of_full_alike"] = ratio(row, by_arm[SAME + suffix, row["pool"]])
        row["of_full"] = ratio(row, by_arm[SAME, row["pool"]])
    return rows
