"""The objective of gates: unchanged predictions, while the tokens that have not faded stay within a capacity.

Large tensors are computed in parts, which the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .student import Student

IGNORED = -100
"""Label of a token that is not a target."""
PART = 2**24
"""Elements of a part."""


class Losses(NamedTuple):
    """Losses of the gates, each a scalar.

    Attributes:
        divergence: forward KL divergence to the model without gates, in nats per token.
        next_token: negative log probability of the next token.
        capacity: see `over_capacity`.
    """

    divergence: Tensor
    next_token: Tensor
    capacity: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the losses, each with weight 1 as in the paper."""
        return self.divergence + self.next_token + self.capacity

    def described(self) -> dict[str, str]:
        """Return the values by name, formatted for messages."""
        return {name: f"{value.item():.4f}" for name, value in self._asdict().items()}


def losses(student: Student, ids: Tensor, labels: Tensor, capacity: int) -> Losses:
    """Return the losses of a batch.

    Args:
        student: model and gates.
        ids: token ids `[n, T]`.
        labels: the same, with `IGNORED` for tokens that are not targets.
        capacity: tokens that may be kept.
    """
    with torch.no_grad():
        wanted, _ = student(ids, gated=False)
    own, log_beta = student(ids, gated=True)
    assert log_beta is not None
    counted = labels[:, 1:] != IGNORED
    rows = (own[:, :-1][counted], wanted[:, :-1][counted], labels[:, 1:][counted])
    step = max(1, PART // student.model.config.get_text_config().vocab_size)
    sums = [
        checkpoint(_compare, student.head, *part, use_reentrant=False)
        for part in zip(*(tensor.split(step) for tensor in rows), strict=True)
    ]
    divergence, next_token = (sum(column) / counted.sum() for column in zip(*sums, strict=True))
    return Losses(divergence, next_token, over_capacity(log_beta, capacity))


def _compare(head: Callable[[Tensor], Tensor], own: Tensor, wanted: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return both losses summed over rows: hidden states `[N, E]` with and without gates, and the next tokens `[N]`."""
    logprobs, target = head(own).float().log_softmax(-1), head(wanted).float().log_softmax(-1)
    return F.kl_div(logprobs, target, reduction="sum", log_target=True), F.nll_loss(
        logprobs, following, reduction="sum"
    )


def over_capacity(log_beta: Tensor, capacity: int) -> Tensor:
    """Return by how much the tokens that have not faded exceed the capacity.

    Args:
        log_beta: `[..., T, H]`.
        capacity: M, tokens.

    Returns:
        Mean of `max(0, sum_i beta_i ** (t - i) - M) / (t - M)` over the positions t and heads where it is positive: a
        share between 0 and about 1; 0 if the capacity is never exceeded.
    """
    series = log_beta.mT.flatten(0, -2)  # [layers * n * H, T]
    order = torch.arange(series.shape[-1], dtype=torch.float32, device=series.device)
    parts = series.split(max(1, PART // len(order) ** 2))
    lasting = torch.cat([checkpoint(_lasting, part, order, use_reentrant=False) for part in parts])
    excess = (lasting - capacity).clamp(min=0) / (order - capacity).clamp(min=1)
    return excess.sum() / (excess > 0).sum().clamp(min=1)


def _lasting(log_beta: Tensor, order: Tensor) -> Tensor:
    """Return `sum_i beta_i ** (t - i)` of `[N, T]` for each t."""
    ages = order[:, None] - order
    return torch.where(ages >= 0, (log_beta[:, None] * ages.clamp(min=0)).exp(), 0.0).sum(-1)
