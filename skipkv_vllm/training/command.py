"""Command line of `skipkv train-gates`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..core.errors import KVPolicyError
from ..evaluation.command import add_inputs, check_at_least, guarded, load_tokenizer
from ..evaluation.machine import relative, versions
from ..evaluation.texts import Text, read_sources, take_in_turn
from ..policies.gates import PYTORCH_FILES
from . import attention
from .loop import Progress, batches, measure, train
from .losses import Losses
from .student import Student

DESCRIPTION = """Train the gates that --kv-policy trimkv reads, on your texts. The model is frozen and teaches them:
they are to leave its predictions as they are while no more than --capacity tokens last. The last eighth of the texts is
only measured, before and after. Ctrl-C writes the gates as they are."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HELD_OUT = 8
"""One text of so many is held out."""
LASTING = 0.9
"""What is left of the first token at the end of a text, before training."""


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_inputs(parser)
    parser.add_argument("--out", type=Path, default=Path("gates.safetensors"), metavar="FILE", help="file to write")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of each text")
    parser.add_argument("--capacity", type=int, metavar="N", help="tokens that may last; None: an eighth of --length")
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="batches to train on")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens a step; at least one text")
    parser.add_argument("--lr", type=float, default=1e-2, metavar="RATE", help="highest learning rate")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="units of a gate's hidden layer")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the model; None: float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="where to train; None: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights and the texts' order")
    return parser


def run(args: argparse.Namespace) -> None:
    """Train, print the losses of the held-out texts and write the file.

    Args:
        args: of `make_parser`.

    Raises:
        KVPolicyError: bad input.
        RunError: the training diverged.
        KeyboardInterrupt: stopped; the file is written if a step was made.
    """
    _check(args)
    tokenizer = load_tokenizer(args.model)
    texts = take_in_turn(read_sources(args.texts, tokenizer), tokenizer, args.length, None)
    if len(texts) < 2:
        raise KVPolicyError(
            f"--texts: there is one text of --length {args.length}, and one is held out; give more text or a smaller "
            "--length"
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
    print(f"wrote {args.out}" + ("" if after else f" as it is after {done.steps} of {args.steps} steps"))
    if after is None:
        raise KeyboardInterrupt


def _check(args: argparse.Namespace) -> None:
    """Check what can be told without the model, and fill in defaults."""
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
    _check_out(args.out)
    args.batch_tokens = max(args.batch_tokens, args.length)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")


def _check_out(out: Path) -> None:
    """Raise `KVPolicyError` unless a file can be written there; training takes long."""
    folder = out.absolute().parent
    if not folder.is_dir():
        raise KVPolicyError(f"--out {out}: its folder does not exist; create it, or choose another path")
    if out.is_dir():
        raise KVPolicyError(f"--out {out}: is a folder; name a file, e.g. {out / 'gates.safetensors'}")
    if out.suffix in PYTORCH_FILES:
        raise KVPolicyError(f"--out {out}: files of that ending are read as PyTorch's; name it .safetensors")
    if not os.access(out if out.exists() else folder, os.W_OK):
        raise KVPolicyError(f"--out {out}: cannot be written; change its permissions, or choose another path")


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """The model that is to be trained, on its device.

    Raises:
        KVPolicyError: it cannot be loaded, or is not made for texts of such a length.
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
    """The logit of beta of which `LASTING` is left after so many tokens."""
    beta = LASTING ** (1 / length)
    return math.log(beta / (1 - beta))


def _print_change(before: Losses, after: Losses) -> None:
    old, new = ({"total": f"{found.total.item():.4f}"} | found.described() for found in (before, after))
    print("held out, before -> after: " + ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old))


def describe(
    args: argparse.Namespace, texts: Sequence[Text], done: Progress, before: Losses, after: Losses | None
) -> dict[str, str]:
    """The file's metadata: settings, and the losses of the held-out texts."""
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
    return guarded(prog, lambda: run(args), stopped="a further run begins anew")
