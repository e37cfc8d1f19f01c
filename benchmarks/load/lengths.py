"""Prompt and output lengths of an offered load."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Log-normal lengths: the median in tokens, and the standard deviation of the logarithm."""

    prompt_median: float
    prompt_spread: float
    output_median: float
    output_spread: float


DISTRIBUTIONS = {
    # Means of 161 and 338 tokens, as the vLLM paper (arXiv 2309.06180, section 6.1) states them for ShareGPT.
    "sharegpt": Distribution(60, 1.40, 190, 1.07),
    # Short questions, long chains of thought.
    "reasoning": Distribution(100, 0.50, 4000, 0.70),
}


class Offered(NamedTuple):
    """One request: the tokens of its prompt and of its answer (at most, if it may stop by itself)."""

    num_prompt: int
    num_output: int

    @property
    def length(self) -> int:
        """Tokens at its end."""
        return self.num_prompt + self.num_output


def offered_load(args: argparse.Namespace) -> list[Offered]:
    """The requests of a run; the same for the same arguments."""
    shape, random = DISTRIBUTIONS[args.lengths], np.random.default_rng(args.seed)
    outputs = args.output_median or shape.output_median
    prompts = args.prompt_median or shape.prompt_median
    prompt = random.lognormal(np.log(prompts), shape.prompt_spread, args.requests)
    output = random.lognormal(np.log(outputs), shape.output_spread, args.requests)
    prompt = prompt.clip(args.prompt_min, args.prompt_max)
    output = output.clip(args.output_min, args.output_max)
    return [Offered(int(p), int(o)) for p, o in zip(prompt, output, strict=True)]


def pages_needed(load: Sequence[Offered], page_size: int) -> int:
    """Pages that hold all requests of a load at their full length."""
    return sum(-(-each.length // page_size) for each in load)


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `offered_load` reads."""
    group = parser.add_argument_group("offered load")
    group.add_argument("--requests", type=int, default=40, help="all are there at the start")
    group.add_argument("--lengths", choices=sorted(DISTRIBUTIONS), default="reasoning")
    group.add_argument("--prompt-median", type=int, help="default: that of --lengths")
    group.add_argument("--prompt-min", type=int, default=8)
    group.add_argument("--prompt-max", type=int, default=512)
    group.add_argument("--output-median", type=int, help="default: that of --lengths")
    group.add_argument("--output-min", type=int, default=1024)
    group.add_argument("--output-max", type=int, default=3000)
    group.add_argument("--natural-stop", action="store_true", help="requests may stop by themselves")
    group.add_argument("--seed", type=int, default=0)


def check_length_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with an error if the flags contradict each other."""
    if args.requests < 1:
        parser.error(f"--requests {args.requests} is out of range; allowed: 1 and more")
    if not 1 <= args.output_min <= args.output_max:
        parser.error(f"--output-min {args.output_min} must be 1 to --output-max {args.output_max}")
    if not 1 <= args.prompt_min <= args.prompt_max:
        parser.error(f"--prompt-min {args.prompt_min} must be 1 to --prompt-max {args.prompt_max}")
