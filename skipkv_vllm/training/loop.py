"""Train gates, and measure them on held-out texts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluation import RunError
from .losses import Losses, losses
from .student import Student

WARM_UP = 20
"""Most steps in which the learning rate grows; a tenth of a short training."""


class Progress(NamedTuple):
    """Progress of a training: completed steps, and the losses of the last one."""

    steps: int
    losses: Losses | None


def train(student: Student, data: Iterator[tuple[Tensor, Tensor]], *, steps: int, lr: float, capacity: int) -> Progress:
    """Train the gates of a student; Ctrl-C ends it early.

    Args:
        student: model and gates.
        data: batches of token ids and labels, `[n, T]` each.
        steps: batches to train on.
        lr: highest learning rate; it falls to 0 along half a cosine.
        capacity: tokens that may be kept.

    Raises:
        RunError: a loss is not finite.
    """
    weights = list(student.gates.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    warm_up, done, found = min(WARM_UP, math.ceil(steps / 10)), 0, None
    try:
        for step, (ids, labels) in enumerate(bar := tqdm(itertools.islice(data, steps), total=steps, unit="step")):
            found = losses(student, ids, labels, capacity)
            if not found.total.isfinite():
                raise RunError(
                    f"step {step}: the losses are {found.described()}; use a smaller --lr or --dtype float32"
                )
            optimizer.zero_grad()
            found.total.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            done = step + 1
            bar.set_postfix(found.described())
    except KeyboardInterrupt:
        bar.close()
    return Progress(done, found)


@torch.no_grad()
def measure(student: Student, texts: Sequence[Sequence[int]], capacity: int) -> Losses:
    """Return the mean losses over texts, computed one text at a time."""
    rows = [torch.tensor([text], device=student.model.device) for text in texts]
    found = [losses(student, ids, ids, capacity) for ids in tqdm(rows, unit="text", desc="held out")]
    return Losses(*(torch.stack(column).mean() for column in zip(*found, strict=True)))


def batches(
    texts: Sequence[Sequence[int]], per_step: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches of texts of equal length; no text repeats before all were used.

    Args:
        texts: token ids.
        per_step: texts per batch; fewer if there are fewer texts.
        seed: of their order.
        device: of the batches.
    """
    draw = random.Random(seed)
    per_step = min(per_step, len(texts))
    waiting: list[Sequence[int]] = []
    while True:
        while len(waiting) < per_step:
            waiting += draw.sample(texts, len(texts))
        ids = torch.tensor(waiting[:per_step], device=device)
        del waiting[:per_step]
        yield ids, ids
