"""The operator of learned gates: two matrix products, for which PyTorch's own libraries are the only backend."""

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
"""Name in a model's configuration -> function."""


def check_activation(name: str) -> None:
    """Raise `KVPolicyError` unless gates can have a model's activation."""
    if name not in ACTIVATIONS:
        raise KVPolicyError(
            f"learned gates do not support their model's activation {name!r} (supported: {', '.join(ACTIVATIONS)}); "
            "use a --kv-policy without gates"
        )


def log_beta(hidden: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str) -> Tensor:
    """Compute `logsigmoid(W2 act(W1 h + b1) + b2)` of each token, float32 `[..., H]` (TRIM-KV, arXiv 2512.03324).

    Args:
        hidden: `[..., E]`, the input of the attention block.
        weight1, bias1: `[width, E]` and `[width]`, in the dtype of `hidden`.
        weight2, bias2: float32 `[H, width]` and `[H]`.
        activation: of `ACTIVATIONS`.
    """
    inner = ACTIVATIONS[activation](F.linear(hidden, weight1, bias1))
    return F.logsigmoid(F.linear(inner.float(), weight2, bias2))


def token_gates(
    hidden: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str, out: Tensor
) -> None:
    """Write `log_beta` of each token of a step.

    This is an operator so that a compiled model and its graphs execute it; they drop computations without a result.

    Args:
        hidden: `[T, E]`.
        weight1, bias1, weight2, bias2, activation: as for `log_beta`.
        out: float32 `[>= T, H]`; the first T rows are written.
    """
    out[: hidden.shape[0]] = log_beta(hidden, weight1, bias1, weight2, bias2, activation)


_operator = torch.library.custom_op(f"{NAMESPACE}::token_gates", token_gates, mutates_args=("out",))
_operator.register_fake(lambda *args: None)
