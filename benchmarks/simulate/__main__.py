"""Predict the throughput of full KV and of a policy on GPUs that are not here; write `docs/results/simulation.json`.

    python -m benchmarks.simulate --gpu H100 --models 7B 70B --outputs 16384 65536 --gpus 1 8 64
    python -m benchmarks.simulate --calibration build/h100/throughput.json --calibrated-with 7B
    python -m benchmarks.simulate --gpu H200 --calibration docs/results/kernels-gpu.json

Without --calibration, what an engine reaches of the GPU's published figures is assumed (`gpus.Efficiency`). A file of
`benchmarks.throughput` replaces this by the steps that it measured on one GPU of that kind, and a file of
`benchmarks.kernels` replaces the cost of compactions and of the operators of every step.
"""

from __future__ import annotations

import argparse
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
from skipkv_vllm.capacity import ModelShape, Pool, blocks_with_policy
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits

from .calibration import Costs, read_costs
from .events import Engine, Outcome, Setup
from .eviction import RULES, Eviction, EvictionCost
from .gpus import GPU, GPUS, Efficiency
from .steptime import on_gpu

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
    gpu = GPUS[args.gpu]
    rows = []
    try:
        costs = Costs(gpu, Efficiency())
        if args.calibration:
            costs = read_costs(args.calibration, gpu, MODELS[args.calibrated_with].parameters)
        for name in args.models:
            rows += _rows_of(args, name, gpu, costs, config)
    except KVPolicyError as error:
        parser.error(str(error))
    if not rows:
        ranks = max(replica(MODELS[name], gpu, args.kv_share) for name in args.models)
        parser.error(f"--gpus {args.gpus}: no model fits so few; a replica takes up to {ranks} of {args.gpu}")
    print(simulation_table(rows))
    rule = Eviction.of(config, config.kv_budget + config.kv_buffer, args.keys).rule
    how = {"origin": costs.origin, "rule": rule, "scoring": RULES[rule], "efficiency": asdict(costs.efficiency)}
    run = record("benchmarks.simulate", vars(args), arguments, **how)
    publish({"run": run, "rows": rows}, args.out)
    return 0


def _rows_of(
    args: argparse.Namespace, name: str, gpu: GPU, costs: Costs, config: KVPolicyConfig
) -> list[dict[str, Any]]:
    """Simulate a model at each length, and multiply its replica."""
    model, rows = MODELS[name], []
    ranks = replica(model, gpu, args.kv_share)
    gpus = [number for number in args.gpus if number >= ranks and number % ranks == 0]
    eviction = Eviction.of(config, config.kv_budget + config.kv_buffer, args.keys)
    cost = costs.of(split(model.shape, ranks), eviction, min(MAX_SEQS, args.requests))
    for output in args.outputs if gpus else ():
        found = {
            kind: _simulate(args, model, gpu, ranks, costs.efficiency, output, each)
            for kind, each in (("full", None), ("policy", (config, cost)))
        }
        ratio = found["policy"].tokens_per_second / found["full"].tokens_per_second
        for number in gpus:
            # Replicas share nothing, so each answers its part of the load in the same time.
            both = {
                kind: _outcome(outcome) | {"tokens_per_second": outcome.tokens_per_second * number // ranks}
                for kind, outcome in found.items()
            }
            row = {"model": name, "output": output, "gpus": number, "ranks": ranks}
            rows.append(row | both | {"ratio": ratio, "compaction_ms": 1e3 * cost.per_compaction})
    return rows


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
    policy: tuple[KVPolicyConfig, EvictionCost] | None,
) -> Outcome:
    """Simulate one replica that answers its load; without a policy with full KV."""
    random, shape = np.random.default_rng(args.seed), split(model.shape, ranks)
    mean = np.log(output) - args.spread**2 / 2
    memory = _kv_memory(model, gpu, ranks)
    # vLLM takes no request that full KV cannot hold alone; both engines get the same ones.
    longest = min(args.prompt + 4 * output, memory // shape.kv_bytes // PAGE * PAGE)
    outputs = random.lognormal(mean, args.spread, args.requests).clip(1, longest - args.prompt)
    load = [Offered(args.prompt, int(each)) for each in outputs]
    seqs = min(MAX_SEQS, args.requests)
    if policy is None:
        setup = Setup(memory // (PAGE * shape.kv_bytes), PAGE, seqs, MAX_TOKENS, stride=args.stride)
        return Engine(load, setup).run(on_gpu(gpu, shape, model.parameters, ranks, efficiency))
    config, cost = policy
    limits = Limits(config.kv_budget, config.kv_buffer, config.kv_window, 0)
    pages = blocks_with_policy(config, shape, memory, Pool(0, PAGE, seqs, longest, MAX_TOKENS))
    setup = Setup(pages, PAGE, seqs, MAX_TOKENS, limits, stride=args.stride)
    return Engine(load, setup).run(on_gpu(gpu, shape, model.parameters, ranks, efficiency, cost))


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("peak_running", "preemptions", "compactions")}


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
    parser.add_argument(
        "--keys", choices=["distinct", "similar"], default="distinct", help="what methods that compare keys find"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of benchmarks.throughput or benchmarks.kernels on this GPU"
    )
    parser.add_argument("--calibrated-with", choices=sorted(MODELS), default="7B", help="the model of that run")
    parser.add_argument("--out", type=Path, default=DOCS / SIMULATION)
    return parser


if __name__ == "__main__":
    sys.exit(main())
