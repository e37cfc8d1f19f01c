"""Command line of `skipkv train-gates`."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..core.errors import KVPolicyError
from ..core.files import check_writable
from ..evaluation.command import HelpFormatter, add_inputs, check_at_least, guarded, load_tokenizer
from ..evaluation.machine import relative, versions
from ..evaluation.texts import Text, read_sources, take_in_turn
from ..policies.gates import PYTORCH_FILES
from . import attention
from .loop import Progress, batches, measure, train
from .losses import Losses
from .student import Student

DESCRIPTION = """Train the gates that --kv-policy trimkv reads, on your texts. The model is frozen; its gates learn to
leave its predictions unchanged while keeping at most --capacity tokens. The last eighth of the texts is held out and
measured before and after the training. Ctrl-C stops the training and writes the current gates."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HELD_OUT = 8
"""One text in this many is held out."""
LASTING = 0.9
"""Share of the first token's weight left at the end of a text, before training."""


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter)
    add_inputs(parser)
    parser.add_argument("--out", type=Path, default=Path("gates.safetensors"), metavar="FILE", help="file to write")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of each text")
    parser.add_argument("--capacity", type=int, metavar="N", help="tokens to keep (default: an eighth of --length)")
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="batches to train on")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N", help="tokens per step; at least one text"
    )
    parser.add_argument("--lr", type=float, default=1e-2, metavar="RATE", help="highest learning rate")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="units of a gate's hidden layer")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="data type of the model (default: float32 on CPU, else bfloat16)"
    )
    parser.add_argument("--device", help="device to train on (default: a GPU if available)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the initial weights and the order of the texts"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Train, print the losses on the held-out texts, and write the file.

    Args:
        args: of `make_parser`.

    Raises:
        KVPolicyError: bad input.
        RunError: the training diverged.
        KeyboardInterrupt: interrupted; the file is written if a step was completed.
    """
    _check(args)
    tokenizer = load_tokenizer(args.model)
    texts = take_in_turn(read_sources(args.texts, tokenizer), tokenizer, args.length, None)
    if len(texts) < 2:
        raise KVPolicyError(
            f"--texts: there is only one text of --length {args.length}, and one must be held out; give more text or a "
            "smaller --length"
        )
    num_held_out = math.ceil(len(texts) / HELD_OUT)
    own, held_out = ([text.tokens for text in part] for part in (texts[:-num_held_out], texts[-num_held_out:]))
    torch.manual_seed(args.seed)
    model = load_model(args)
    student = Student(model, args.width, bias=initial_bias(args.length))
    print(f"training on {len(own)} texts of {args.length} tokens, {len(held_out)} held out; capacity {args.capacity}")
    before = measure(student, held_out, args.capacity)
    data = batches(own, args.batch_tokens // args.length, args.seed, model.device)
    done = train(student, data, steps=args.steps, lr=args.lr, capacity=args.capacity)
    if not done.steps:
        raise KeyboardInterrupt
    after = None
    if done.steps == args.steps:
        with contextlib.suppress(KeyboardInterrupt):
            after = measure(student, held_out, args.capacity)
            _print_change(before, after)
    student.trained().save(args.out, describe(args, texts, done, before, after))
    print(f"wrote {args.out}" + ("" if after else f" after {done.steps} of {args.steps} steps"))
    if after is None:
        raise KeyboardInterrupt


def _check(args: argparse.Namespace) -> None:
    """Check the options that do not depend on the model, and fill in defaults."""
    for flag, value, low in (
        ("--length", args.length, 16),
        ("--steps", args.steps, 1),
        ("--batch-tokens", args.batch_tokens, 1),
        ("--width", args.width, 1),
    ):
        check_at_least(flag, value, low)
    if args.capacity is None:
        args.capacity = args.length // 8
    if not 1 <= args.capacity < args.length:
        raise KVPolicyError(
            f"--capacity {args.capacity} is out of range; allowed: 1 to {args.length - 1}, less than --length"
        )
    if not 0 < args.lr <= 1:
        raise KVPolicyError(f"--lr {args.lr} is out of range; allowed: above 0, up to 1")
    if not 0 <= args.seed < 2**63:
        raise KVPolicyError(f"--seed {args.seed} is out of range; allowed: 0 to 2 ** 63 - 1")
    check_writable("--out", args.out)
    if args.out.suffix in PYTORCH_FILES:
        raise KVPolicyError(f"--out {args.out}: this suffix is reserved for PyTorch files; use .safetensors")
    args.batch_tokens = max(args.batch_tokens, args.length)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """Load the model to train onto its device.

    Raises:
        KVPolicyError: it cannot be loaded, or does not support texts of this length.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=DTYPES[args.dtype], attn_implementation=attention.NAME
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KVPolicyError(
            f"--model {args.model}: cannot be loaded ({reason}); give a causal language model"
        ) from None
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", args.length)
    if args.length > longest:
        raise KVPolicyError(f"--length {args.length} is out of range; this model takes at most {longest} tokens")
    try:
        return model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).strip().partition("\n")[0]
        raise KVPolicyError(f"--device {args.device}: the model cannot be moved there ({reason})") from None


def initial_bias(length: int) -> float:
    """Return the logit of the beta for which `beta ** length` is `LASTING`."""
    beta = LASTING ** (1 / length)
    return math.log(beta / (1 - beta))


def _print_change(before: Losses, after: Losses) -> None:
    old, new = ({"total": f"{found.total.item():.4f}"} | found.described() for found in (before, after))
    print("held out, before -> after: " + ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old))


def describe(
    args: argparse.Namespace, texts: Sequence[Text], done: Progress, before: Losses, after: Losses | None
) -> dict[str, str]:
    """Return the file's metadata: settings, and the losses on the held-out texts."""
    settings: dict[str, Any] = {
        name: value for name, value in vars(args).items() if name not in ("model", "texts", "out")
    }
    found = {f"held_out_{name}_before": value for name, value in before.described().items()}
    if after is not None:
        found |= {f"held_out_{name}_after": value for name, value in after.described().items()}
    return {
        "method": "TRIM-KV, arXiv 2512.03324",
        "made_by": "skipkv train-gates",
        "base_model": relative(args.model),
        "data": ", ".join(sorted({text.source for text in texts})),
        "num_texts": str(len(texts)),
        "steps_made": str(done.steps),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        **{name: str(value) for name, value in settings.items()},
        **found,
    }


def main(prog: str, arguments: Sequence[str]) -> int:
    """Run `skipkv train-gates`; returns the exit status."""
    args = make_parser(prog).parse_args(list(arguments))
    return guarded(prog, lambda: run(args), stopped="the next run starts from the beginning")
