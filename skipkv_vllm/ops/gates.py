"""The operator of learned gates. It has no backends: two matrix products, which PyTorch's own libraries do best."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .schema import NAMESPACE

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Name in a model's configuration -> what it computes."""


def token_gates(
    hidden: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str, said: Tensor
) -> None:
    """`logsigmoid(W2 act(W1 h + b1) + b2)` of each token of a step (TRIM-KV, arXiv 2512.03324).

    An operator, so that compiled code and graphs of a model carry it out, which would drop what nothing reads.

    Args:
        hidden: `[T, E]`, what enters the attention block.
        weight1, bias1: `[width, E]` and `[width]`, in the dtype of `hidden`.
        weight2, bias2: float32 `[H, width]` and `[H]`.
        activation: of `ACTIVATIONS`.
        said: float32 `[>= T, H]`; the first T rows are written.
    """
    inner = ACTIVATIONS[activation](F.linear(hidden, weight1, bias1))
    said[: hidden.shape[0]] = F.logsigmoid(F.linear(inner.float(), weight2, bias2))


_operator = torch.library.custom_op(f"{NAMESPACE}::token_gates", token_gates, mutates_args=("said",))
_operator.register_fake(lambda *args: None)
