"""Train the bundled reasoning model from nothing: seeded, resumable, about 25 minutes on two cores.

    python -m benchmarks.tiny_reasoner.train --out skipkv_vllm/models/tiny-reasoner

The curriculum grows from two rules to full problems; the next level starts when 97 % of the numbers in unseen
exercises without doubts (the hardest to copy) are right. On the last level the learning rate decays to zero over
`--final-steps`. Stop it at any time (Ctrl-C) and run the same command again: it goes on where it was. The checkpoint
is written when training is finished; until then there is only the state. Exercises are the same for every seed, which
decides the initial weights.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from skipkv_vllm.training.losses import IGNORED

from .problems import FULL_RULES, MODULUS, SPLITS, Problem, make_problem
from .tokenizer import build_tokenizer

SEEDS_PER_STEP = 1000  # more than a batch has rows, so that no exercise comes twice


@dataclass(frozen=True)
class Level:
    """One level of the curriculum.

    Attributes:
        name: for the progress bar.
        rules, doubt: of `make_problem`.
    """

    name: str
    rules: tuple[int, int]
    doubt: tuple[float, float]

    def draw(self, seed: int, *, doubt: tuple[float, float] | None = None) -> Problem:
        """An exercise of this level; `doubt` overrides the level's."""
        return make_problem(seed, rules=self.rules, doubt=self.doubt if doubt is None else doubt)


CURRICULUM = (
    Level("two rules", (2, 2), (0.0, 0.3)),
    Level("few doubts", (2, 5), (0.0, 0.6)),
    # Doubts are likely enough that greedy decoding always doubts, and of varying number, so that where a text stands
    # cannot be told from how much was written.
    Level("full", FULL_RULES, (0.7, 1.0)),
)


def model_config(vocab_size: int, eos: int, pad: int) -> Qwen2Config:
    """The shape of the bundled model: Qwen2, 4 layers, width 128, 4 heads over 2 kv heads."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of prompt + completion + end of turn, and the prompt's length."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    completion = tokenizer(problem.completion, add_special_tokens=False).input_ids
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


def batch(
    draw: Callable[[int], Problem], seed: int, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels [n, length] of about `tokens` tokens; the prompt is not a target."""
    rows = [encode(draw(seed), tokenizer)]
    while (len(rows) + 1) * max(len(ids) for ids, _ in rows) <= tokens:
        rows.append(encode(draw(seed + len(rows)), tokenizer))
    ids = torch.full((len(rows), max(len(r) for r, _ in rows)), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, n_prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, n_prompt : len(row)] = ids[i, n_prompt : len(row)]
    return ids, labels


@torch.no_grad()
def digit_accuracy(
    model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, digits: torch.Tensor
) -> tuple[float, float]:
    """Teacher-forced accuracy over digit targets, and the share of rows with every target right."""
    model.eval()
    guess = model(input_ids=ids).logits[:, :-1].argmax(-1)
    model.train()
    target = labels[:, 1:]
    is_digit = torch.isin(target, digits)
    right = guess == target
    whole = (right | (target == IGNORED)).all(1)
    return right[is_digit].float().mean().item(), whole.float().mean().item()


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), in float32 and batched over equal shapes.

    `torch.optim.Muon` orthogonalises in bfloat16, which takes longer than the rest of a step on a CPU that
    emulates it.
    """

    def __init__(self, params: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    assert param.grad is not None
                    average = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    average.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(average, group["momentum"]))
                # Scaled so that an entry moves about as far as one of AdamW's would.
                scale = 0.2 * max(shape) ** 0.5
                for param, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    param.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz steps; `[n, rows, columns]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def make_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, the output matrix and all vectors."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)]


RESUMED = ("seed", "lr", "tokens", "final_steps")
"""Arguments that a resumed training must share with the one it goes on with."""


def train(args: argparse.Namespace) -> int:
    """Run or resume the curriculum and write the checkpoint; returns 0 once it is finished, else 1."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer()
    digits = torch.tensor([tokenizer.convert_tokens_to_ids(f" {d}") for d in range(MODULUS)], device=device)
    model = Qwen2ForCausalLM(model_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id))
    model.to(device)
    optimizers = make_optimizers(model)
    step, level, final_step = 0, 0, 0
    state_file = Path(args.state)
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        arguments = state.get("arguments", {})
        if other := [name for name in RESUMED if arguments.get(name) != vars(args)[name]]:
            print(
                f"error: --state {state_file} was trained with other arguments: "
                + ", ".join(f"{name} was {arguments.get(name)}, is {vars(args)[name]}" for name in other)
                + "; use the same ones, or another --state to start anew",
                file=sys.stderr,
            )
            return 2
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, level, final_step = state["step"], state["level"], state["final_step"]
        print(f"resuming at step {step}, level {CURRICULUM[level].name}")

    def save() -> None:
        state_file.parent.mkdir(parents=True, exist_ok=True)
        new_file = state_file.with_suffix(".new")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "level": level,
                "final_step": final_step,
                "arguments": {name: vars(args)[name] for name in RESUMED},
            },
            new_file,
        )
        new_file.replace(state_file)  # so that a power cut leaves the old one

    def draw(split: str, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        exercise = partial(CURRICULUM[level].draw, **kwargs)
        ids, labels = batch(exercise, SPLITS[split] + SEEDS_PER_STEP * step, args.tokens, tokenizer)
        return ids.to(device), labels.to(device)

    deadline = time.monotonic() + 60 * args.minutes
    bar = tqdm(desc=CURRICULUM[level].name, unit="step", initial=step)
    # Ctrl-C waits for the end of a step: half a step could not be resumed.
    stopped: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        while final_step < args.final_steps and time.monotonic() < deadline and not stopped:
            last = level == len(CURRICULUM) - 1
            progress = final_step / args.final_steps
            lr = args.lr * (min(1, (step + 1) / 100) if not last else 0.5 * (1 + math.cos(math.pi * progress)))
            ids, labels = draw("train")
            loss = model(input_ids=ids, labels=labels).loss
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = max(lr, args.lr * 0.01)
                optimizer.step()
            step += 1
            final_step += last
            bar.update()
            if step % 50 == 0:
                dev_ids, dev_labels = draw("dev", doubt=(0.0, 0.0))
                accuracy, whole = digit_accuracy(model, dev_ids, dev_labels, digits)
                bar.set_description(CURRICULUM[level].name)
                bar.set_postfix(loss=f"{loss.item():.3f}", digits=f"{accuracy:.3f}", whole=f"{whole:.2f}")
                if accuracy >= 0.97 and not last:
                    level += 1
            if level == len(CURRICULUM) - 1:
                bar.total = step + args.final_steps - final_step
            if step % 200 == 0:
                save()
    finally:
        signal.signal(signal.SIGINT, handler)
        bar.close()
    save()
    if final_step < args.final_steps:
        print(f"stopped at step {step}, level {CURRICULUM[level].name}; run the same command to go on")
        return 1
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"finished at step {step}, wrote {args.out}; to train anew use another --state or delete {state_file}")
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="skipkv_vllm/models/tiny-reasoner", help="checkpoint folder")
    parser.add_argument("--state", default="build/tiny-reasoner.pt", help="resumable training state")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=4000, help="padded tokens per step")
    parser.add_argument("--final-steps", type=int, default=3000, help="steps on full problems, with lr decay")
    parser.add_argument("--minutes", type=float, default=120, help="stop after this long; run again to go on")
    parser.add_argument("--threads", type=int, default=2)
    return train(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
