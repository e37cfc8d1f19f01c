"""Predict the throughput of full KV and of a policy on GPUs that are not here; write `docs/results/simulation.json`.

    python -m benchmarks.simulate --gpu H100 --models 7B 70B --outputs 16384 65536 --gpus 1 8 64
    python -m benchmarks.simulate --calibration build/h100/throughput.json --calibrated-with 7B

Without --calibration, what an engine reaches of the GPU's published figures is assumed (`steptime.Efficiency`). With
it, it comes from the steps that `benchmarks.throughput` measured on one GPU of that kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load.lengths import Offered
from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from benchmarks.results.sections.simulation import simulation_table
from benchmarks.results.store import DOCS, SIMULATION
from skipkv_vllm import KVPolicyError
from skipkv_vllm.capacity import ModelShape, blocks_with_policy
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits

from .events import Engine, Outcome, Setup
from .steptime import GPU, GPUS, Efficiency, Eviction, StepTime, calibrated, on_gpu, read_step_time

GIB = 2**30
PAGE, MAX_SEQS, MAX_TOKENS = 16, 1024, 8192
USED, OVERHEAD = 0.92, 3 * GIB
"""Share of a GPU's memory that vLLM uses, and what of that is neither weights nor KV."""


class Model(NamedTuple):
    """A model from its published configuration: parameters, and its shape on one rank."""

    parameters: float
    shape: ModelShape


MODELS = {
    "7B": Model(7.62e9, ModelShape(28, 28, 4, 128, 3584, 152064, 2)),  # DeepSeek-R1-Distill-Qwen-7B
    "14B": Model(14.8e9, ModelShape(48, 40, 8, 128, 5120, 152064, 2)),  # DeepSeek-R1-Distill-Qwen-14B
    "32B": Model(32.8e9, ModelShape(64, 40, 8, 128, 5120, 152064, 2)),  # DeepSeek-R1-Distill-Qwen-32B
    "70B": Model(70.6e9, ModelShape(80, 64, 8, 128, 8192, 128256, 2)),  # DeepSeek-R1-Distill-Llama-70B
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        config = KVPolicyConfig.parse({"kv_policy": args.policy, "kv_budget": args.budget, "kv_buffer": args.buffer})
    except KVPolicyError as error:
        parser.error(str(error))
    gpu, efficiency, origin = GPUS[args.gpu], Efficiency(), "assumed, not measured"
    if args.calibration:
        efficiency, origin = _calibrate(args, gpu, parser)
    rows = []
    for name in args.models:
        ranks = replica(MODELS[name], gpu, args.kv_share)
        for output in args.outputs:
            found = {
                kind: _simulate(args, MODELS[name], gpu, ranks, efficiency, output, each)
                for kind, each in (("full", None), ("policy", config))
            }
            for gpus in args.gpus:
                if gpus < ranks or gpus % ranks:
                    continue
                # Replicas share nothing, so each answers its part of the load in the same time.
                both = {
                    kind: _outcome(outcome) | {"tokens_per_second": outcome.tokens_per_second * gpus // ranks}
                    for kind, outcome in found.items()
                }
                ratio = found["policy"].tokens_per_second / found["full"].tokens_per_second
                rows.append({"model": name, "output": output, "gpus": gpus, "ranks": ranks, **both, "ratio": ratio})
    if not rows:
        parser.error(f"--gpus {args.gpus}: no model fits so few; a replica takes up to {ranks} of {args.gpu}")
    print(simulation_table(rows))
    run = record("benchmarks.simulate", vars(args), arguments, origin=origin, efficiency=asdict(efficiency))
    publish({"run": run, "rows": rows}, args.out)
    return 0


def replica(model: Model, gpu: GPU, kv_share: float) -> int:
    """Fewest GPUs, a power of two, whose used memory leaves a share for KV."""
    ranks = 1
    while _kv_memory(model, gpu, ranks) < kv_share * gpu.memory * GIB:
        ranks *= 2
    return ranks


def _kv_memory(model: Model, gpu: GPU, ranks: int) -> int:
    """Bytes of one rank for KV and the policy."""
    weights = model.parameters * model.shape.element_size / ranks
    return int(USED * gpu.memory * GIB - OVERHEAD - weights)


def split(shape: ModelShape, ranks: int) -> ModelShape:
    """The shape of one of several ranks."""
    return replace(shape, num_heads=shape.num_heads // ranks, num_kv_heads=max(1, shape.num_kv_heads // ranks))


def _simulate(
    args: argparse.Namespace,
    model: Model,
    gpu: GPU,
    ranks: int,
    efficiency: Efficiency,
    output: int,
    config: KVPolicyConfig | None,
) -> Outcome:
    """Simulate one replica that answers its load."""
    random, shape = np.random.default_rng(args.seed), split(model.shape, ranks)
    mean = np.log(output) - args.spread**2 / 2
    memory = _kv_memory(model, gpu, ranks)
    # vLLM takes no request that full KV cannot hold alone; both engines get the same ones.
    longest = min(args.prompt + 4 * output, memory // shape.kv_bytes // PAGE * PAGE)
    outputs = random.lognormal(mean, args.spread, args.requests).clip(1, longest - args.prompt)
    load = [Offered(args.prompt, int(each)) for each in outputs]
    seqs = min(MAX_SEQS, args.requests)
    if config is None:
        setup = Setup(memory // (PAGE * shape.kv_bytes), PAGE, seqs, MAX_TOKENS, stride=args.stride)
        return Engine(load, setup).run(on_gpu(gpu, shape, model.parameters, ranks, efficiency))
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    pages = blocks_with_policy(
        config, shape, memory, block_size=PAGE, max_num_seqs=seqs, max_length=longest, max_tokens=MAX_TOKENS
    )
    setup = Setup(pages, PAGE, seqs, MAX_TOKENS, limits, stride=args.stride)
    time = on_gpu(gpu, shape, model.parameters, ranks, efficiency, Eviction(limits.bound, limits.buffer))
    return Engine(load, setup).run(time)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("peak_running", "preemptions", "compactions")}


def _calibrate(args: argparse.Namespace, gpu: GPU, parser: argparse.ArgumentParser) -> tuple[Efficiency, str]:
    """Read the efficiency that a measured run reached on this kind of GPU."""
    try:
        figures = json.loads(args.calibration.read_text())
        found, run = figures["calibration"], figures["run"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--calibration {args.calibration}: not a file of benchmarks.throughput ({error})")
    gpus = run["machine"]["gpus"]
    if not any(args.gpu in each for each in gpus):
        parser.error(
            f"--calibration {args.calibration} was measured on {', '.join(gpus) or 'a machine without a GPU'}, which "
            f"says nothing about an {args.gpu}; run benchmarks.throughput on one"
        )
    policy: StepTime = read_step_time(found[run["settings"]["policy"]])
    eviction = Eviction(found["bound"], found["buffer"])
    shape, parameters = ModelShape(**found["shape"]), MODELS[args.calibrated_with].parameters
    efficiency = calibrated(policy, gpu, shape, parameters, eviction, Efficiency())
    return efficiency, f"measured at commit {run['commit']} on {run['date']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    parser.add_argument("--models", choices=sorted(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--outputs", type=int, nargs="+", default=[16384, 32768, 65536], metavar="N", help="mean")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--policy", default="skipkv")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.5, help="standard deviation of the logarithm of outputs")
    parser.add_argument("--requests", type=int, default=256, help="of a replica, all there at the start")
    parser.add_argument("--kv-share", type=float, default=0.3, help="of a GPU's memory, at least for KV")
    parser.add_argument("--stride", type=int, default=32, help="steps taken at once; 1 is exact and slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of benchmarks.throughput on this GPU")
    parser.add_argument("--calibrated-with", choices=sorted(MODELS), default="7B", help="the model of that run")
    parser.add_argument("--out", type=Path, default=DOCS / SIMULATION)
    return parser


if __name__ == "__main__":
    sys.exit(main())
