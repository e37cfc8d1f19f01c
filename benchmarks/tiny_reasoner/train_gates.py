"""Train gates for the bundled model by distillation: how long each token matters (TRIM-KV, arXiv 2512.03324).

    python -m benchmarks.tiny_reasoner.train_gates

`skipkv train-gates` does the same for other models (`skipkv_vllm/training/`); here texts are training problems, whose
questions are no targets. Seeded, about three minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipkv_vllm import bundled_gates, bundled_model
from skipkv_vllm.training import attention
from skipkv_vllm.training.loop import train
from skipkv_vllm.training.student import Student

from .problems import SPLITS, make_problem
from .train import batch


def batches(tokens: int, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Training problems, each once."""
    seed = SPLITS["train"]
    while True:
        ids, labels = batch(make_problem, seed, tokens, tokenizer)
        seed += len(ids)
        yield ids, labels


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--out", default=bundled_gates(), help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--width", type=int, default=32, help="units of a gate's hidden layer")
    parser.add_argument("--capacity", type=int, default=20, help="tokens that may last")
    parser.add_argument("--bias", type=float, default=6.0, help="initial logit of beta")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--tokens", type=int, default=1800, help="padded tokens per step")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=attention.NAME)
    student = Student(model, args.width, args.bias)
    data = batches(args.tokens, tokenizer)
    done = train(student, data, steps=args.steps, lr=args.lr, capacity=args.capacity)
    if done.losses is None or done.steps < args.steps:
        print(f"stopped after {done.steps} of {args.steps} steps; nothing was written", file=sys.stderr)
        return 130
    told = {name: str(value) for name, value in vars(args).items() if name not in ("model", "out")}
    told |= {f"loss_{name}": value for name, value in done.losses.described().items()}
    made = {"method": "TRIM-KV, arXiv 2512.03324", "made_by": "python -m benchmarks.tiny_reasoner.train_gates"}
    made |= {"base_model": "tiny-reasoner", "data": "generated problems of the training split"}
    student.trained().save(args.out, made | told)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
