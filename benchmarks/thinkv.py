"""Thresholds of `thinkv` for the bundled model: where the density of its segments' sparsity has minima.

    python -m benchmarks.thinkv --budget 198

Answers training problems with a cache that is compacted to the budget, because sparsity depends on how many tokens are
held, and measures the sparsity of every layer's attention at the end of every segment. Layers whose density has three
modes are taken (all, where there is none). The density is a sum of Gaussians of Silverman's width; where that shows no
three modes, of the largest width below that does (Silverman's critical bandwidth), which is then said.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import NamedTuple

import numpy as np
import torch

from skipkv_vllm import ops
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.policies import Policy
from skipkv_vllm.policies.thinkv import NEGLIGIBLE

from .results.markdown import table
from .unequal_budgets.allocation import Equal
from .unequal_budgets.bench import Bench, policy_of
from .unequal_budgets.generation import NOT_HERE, Layer, Rows

GRID = np.linspace(0, 1, 2001)
NARROWER = 0.95
LEAST_WIDTH = 1e-3


class Valleys(NamedTuple):
    """Two minima of a density, and the width of its kernel as a share of Silverman's."""

    low: float
    high: float
    width: float


def density(samples: np.ndarray, width: float) -> np.ndarray:
    """Kernel density of samples on the grid, up to a factor."""
    return np.exp(-(((GRID[:, None] - samples) / width) ** 2) / 2).sum(axis=1)


def silverman(samples: np.ndarray) -> float:
    """Width of the kernel by Silverman's rule of thumb (1986, eq. 3.31)."""
    spread = min(samples.std(ddof=1), np.subtract(*np.percentile(samples, (75, 25))) / 1.34)
    return max(LEAST_WIDTH, 0.9 * float(spread) * len(samples) ** -0.2)


def minima(values: np.ndarray) -> np.ndarray:
    """Indices of the local minima between two modes."""
    slope = np.sign(np.diff(values))
    rising = np.flatnonzero(slope)
    return rising[1:][(slope[rising][:-1] < 0) & (slope[rising][1:] > 0)]


def valleys(samples: np.ndarray) -> Valleys | None:
    """The two deepest minima between three modes; None if no width of the kernel shows three."""
    whole = silverman(samples)
    width = whole
    while width >= LEAST_WIDTH:
        values = density(samples, width)
        found = minima(values)
        if len(found) >= 2:
            low, high = sorted(found[np.argsort(values[found])[:2]])
            return Valleys(float(GRID[low]), float(GRID[high]), width / whole)
        width *= NARROWER
    return None


def sparsity_of(layer: Layer) -> torch.Tensor:
    """Sparsity of the last queries' attention in one layer, `[R]`; every row and head holds as many tokens."""
    rows, heads = layer.counts.shape
    count = int(layer.counts[0, 0])
    keys = layer.cells[:, :, :count].chunk(2, dim=-1)[0].flatten(0, 1)
    queries = layer.queries.flatten(0, 1).transpose(0, 1)  # [W, R Hq, D]
    positions = layer.positions[:, :, :count].flatten(0, 1)
    return ops.attention_sparsity(queries, keys, positions, negligible=NEGLIGIBLE).view(rows, heads).mean(dim=1)


@torch.inference_mode()
def measure(rows: Rows, policy: Policy, limits: Limits, segment: int) -> np.ndarray:
    """Sparsity at the end of every segment of every answer, `[segments, layers]`."""
    found = []
    due = limits.bound
    while not rows.is_done:
        written = rows.num_logical - rows.num_prompt
        rows.advance(min(due, rows.num_prompt + (written // segment + 1) * segment))
        if (rows.num_logical - rows.num_prompt) % segment == 0:
            found.append(torch.stack([sparsity_of(layer) for layer in rows.layers], dim=1)[~rows.finished])
        if rows.num_logical == due and not rows.is_done:
            rows.compact(policy, Equal(), limits.keep, limits.buffer)
            due += limits.buffer
    return torch.cat(found).double().numpy()


def calibrate(sparsity: np.ndarray) -> tuple[list[int], Valleys | None, list[list[str]]]:
    """Choose the layers and the thresholds, and describe each layer.

    Args:
        sparsity: `[segments, layers]`.
    """
    three, lines = [], []
    for i, samples in enumerate(sparsity.T):
        modes = len(minima(density(samples, silverman(samples)))) + 1
        three += [i] * (modes == 3)
        lines.append([str(i), f"{samples.mean():.3f}", f"{samples.std():.3f}", str(modes)])
    chosen = three or list(range(sparsity.shape[1]))
    return chosen, valleys(sparsity[:, chosen].mean(axis=1)), lines


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=64, help="of the train split")
    parser.add_argument("--policy", default="snapkv", help="what compacts the cache while it is measured")
    parser.add_argument("--budget", type=int, default=198)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=1000)
    args = parser.parse_args()
    for name in ("problems", "budget", "buffer", "window", "segment", "max_tokens"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {getattr(args, name)} is out of range; allowed: at least 1")
    policy = policy_of(args.policy)
    if args.policy == "full" or policy.needs & NOT_HERE:
        parser.error(f"--policy {args.policy} cannot be used here; choose e.g. snapkv, rkv or skipkv")
    bench = Bench(args, split="train")
    rows = bench.rows()
    limits = Limits(args.budget, args.buffer, args.window, rows.num_prompt)
    sparsity = measure(rows, policy, limits, args.segment)
    chosen, found, lines = calibrate(sparsity)
    print(
        f"{len(sparsity)} segments of {args.problems} training problems, {limits.keep} to {limits.bound} tokens held\n"
    )
    print(table(("layer", "mean sparsity", "spread", "modes"), lines))
    if found is None:
        print("\nno kernel shows three modes; there are no thresholds to be had", file=sys.stderr)
        return 1
    mean = sparsity[:, chosen].mean(axis=1)
    above, below = (mean > found.high).mean(), (mean < found.low).mean()
    print(
        f"\ntransition {above:.0%}, reasoning {1 - above - below:.0%}, execution {below:.0%} of the segments; kernel "
        f"of {found.width:.2f} times Silverman's width\n"
    )
    options = {
        "segment": args.segment,
        "transition_above": math.floor(found.high * 1e4) / 1e4,
        "execution_below": math.floor(found.low * 1e4) / 1e4,
        "layers": "all" if len(chosen) == sparsity.shape[1] else ",".join(map(str, chosen)),
    }
    print(f"--kv-policy thinkv --kv-policy-config '{json.dumps(options)}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
