"""The operator of learned gates. It has no backends: two matrix products, which PyTorch's own libraries do best."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import KVPolicyError
from .schema import NAMESPACE

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Name in a model's configuration -> what it computes."""


def check_activation(name: str, remedy: str = "use a --kv-policy without gates") -> None:
    """Raise `KVPolicyError`, with a remedy, unless gates can use a model's activation."""
    if name not in ACTIVATIONS:
        raise KVPolicyError(
            f"learned gates use their model's activation, and {name!r} is not supported (supported: "
            f"{', '.join(ACTIVATIONS)}); {remedy}"
        )


def log_beta(hidden: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str) -> Tensor:
    """`logsigmoid(W2 act(W1 h + b1) + b2)` of each token, float32 `[..., H]` (TRIM-KV, arXiv 2512.03324).

    Args:
        hidden: `[..., E]`, what enters the attention block.
        weight1, bias1: `[width, E]` and `[width]`, in the dtype of `hidden`.
        weight2, bias2: float32 `[H, width]` and `[H]`.
        activation: of `ACTIVATIONS`.
    """
    inner = ACTIVATIONS[activation](F.linear(hidden, weight1, bias1))
    return F.logsigmoid(F.linear(inner.float(), weight2, bias2))


def token_gates(
    hidden: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str, said: Tensor
) -> None:
    """Write `log_beta` of each token of a step.

    An operator, so that compiled code and graphs of a model carry it out, which would drop what nothing reads.

    Args:
        hidden: `[T, E]`; it and the next ones as for `log_beta`.
        said: float32 `[>= T, H]`; the first T rows are written.
    """
    said[: hidden.shape[0]] = log_beta(hidden, weight1, bias1, weight2, bias2, activation)


_operator = torch.library.custom_op(f"{NAMESPACE}::token_gates", token_gates, mutates_args=("said",))
_operator.register_fake(lambda *args: None)
