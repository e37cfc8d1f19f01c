"""The simulator against the measured engines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.load.arms import PRODUCTION, Arm, model_shape, policy_config, pool_pages
from benchmarks.load.engine import Run
from benchmarks.load.lengths import Offered, pages_needed
from benchmarks.simulate.events import Engine, Setup
from benchmarks.simulate.steptime import StepTime, fit
from skipkv_vllm.core.limits import Limits

from .measure import Row


def predict(
    args: argparse.Namespace, load: Sequence[Offered], runs: Mapping[Arm, Run]
) -> tuple[dict[str, Any], list[Row]]:
    """Fit the step time of full KV and of the policy with the largest pool; predict every engine and its error."""
    largest = max(args.pools)
    times: dict[bool, StepTime] = {
        arm.evicts: fit(run.steps) for arm, run in runs.items() if arm.pool == largest and arm.name != PRODUCTION
    }
    config, needed, rows = policy_config(args), pages_needed(load, args.block_size), []
    for arm, run in runs.items():
        if arm.name == PRODUCTION or args.natural_stop:
            continue
        limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0) if arm.evicts else None
        pages = pool_pages(args, arm, int(arm.pool * needed))
        setup = Setup(
            pages,
            args.block_size,
            args.max_num_seqs,
            args.max_num_batched_tokens,
            limits,
            protect_prompt=config.kv_protect_prompt,
        )
        outcome = Engine(load, setup).run(times[arm.evicts])
        measured = run.output_tokens / run.seconds
        rows.append(
            {
                "arm": arm.name,
                "pool": arm.pool,
                "fitted": arm.pool == largest,
                "measured": measured,
                "predicted": outcome.tokens_per_second,
                "error": outcome.tokens_per_second / measured - 1,
                "steps": [len(run.steps), outcome.steps],
                "preemptions": [run.preemptions, outcome.preemptions],
                "compactions": [run.compactions, outcome.compactions],
                "peak_running": [run.peak_running, outcome.peak_running],
            }
        )
    shape = model_shape(args)
    calibration = {
        "full": times[False].as_dict(),
        args.policy: times[True].as_dict(),
        "shape": vars(shape),
        "bound": config.kv_budget + config.kv_buffer,
        "buffer": config.kv_buffer,
    }
    return calibration, rows
