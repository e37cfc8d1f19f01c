"""Effects of a token on the attention of queries, of one request and layer, in PyTorch; see `functional.py`."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Effect(IntEnum):
    """An effect of a token on the attention of a query, which `measure_attention` sums over queries.

    A is the token's attention weight, z its logit, v its value and o the query's output.
    """

    ATTENTION = 0
    """`A`"""
    OUTPUT = 1
    """`A^2 |v - o|^2`: the change of the output without the token, squared and to first order. To second order in A the
    output without a token is `o + A / (1 - A) (o - v)`."""
    VALUE = 2
    """`A^2 |v|^2`: the change of the output if the value becomes zero"""
    KEY = 3
    """`(A z)^2 |v - o|^2`: the change if the key becomes zero, to first order"""
    JOINT = 4
    """`A^2 |v + z (v - o)|^2`: the change if both become zero"""
    SEEN = 5
    """A times the number of tokens that the query sees"""
    NEGLIGIBLE = 6
    """1 divided by the number of tokens that the query sees, if A is below a share of the query's largest; else 0. The
    sum over tokens is the share of negligible weights."""


def attention_weights(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Compute the softmax of logits `[Hkv, G, n, L]` in the presence of attention sinks.

    Args:
        logits: float32, as for `attention_effect`.
        sinks: float32 `[Hkv * G]`, the logit of each query head's sink. It takes a share of the attention, as a token
            with the value zero would. None if there are none.

    Returns:
        float32, of the same shape; rows sum to 1 less the sink's share.
    """
    if sinks is None:
        return logits.softmax(dim=-1)
    total = logits.logsumexp(dim=-1, keepdim=True)
    return (logits - total.logaddexp(sinks.view(*logits.shape[:2], 1, 1))).exp()


def attention_effect(
    logits: Tensor, values: Tensor | None, effect: Effect, negligible: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Sum an effect of each resident token over queries, and average it over the query heads of a kv head.

    Args:
        logits: float32 `[Hkv, G, n, L]`, minus infinity for tokens in a query's future; see `attention_logits`.
        values: `[Hkv, L, D]`; not read for effects without v.
        effect: which one.
        negligible: for `Effect.NEGLIGIBLE`, the share below which a weight is negligible.
        sinks: see `attention_weights`.

    Returns:
        float32 `[Hkv, L]`, not negative.
    """
    attention, sees = attention_weights(logits, sinks), logits > -torch.inf
    if effect is Effect.SEEN:
        attention = attention * sees.sum(dim=-1, keepdim=True)
    elif effect is Effect.NEGLIGIBLE:
        # The ratio of two weights of a row is the ratio of the exponentials of their logits.
        is_small = sees & (logits < logits.amax(dim=-1, keepdim=True) + math.log(negligible))
        attention = is_small / sees.sum(dim=-1, keepdim=True)
    if effect in (Effect.ATTENTION, Effect.SEEN, Effect.NEGLIGIBLE):
        return attention.sum(dim=2).mean(dim=1)
    assert values is not None
    logits, one = logits.masked_fill(~sees, 0.0), torch.ones((), device=logits.device)
    factors = {
        Effect.OUTPUT: (one, one),
        Effect.VALUE: (one, 0 * one),
        Effect.KEY: (logits, logits),
        Effect.JOINT: (1 + logits, logits),
    }
    return output_change(attention, values, *factors[effect])


def output_change(attention: Tensor, values: Tensor, of_value: Tensor, of_output: Tensor) -> Tensor:
    """Compute `A^2 |x v - y o|^2` with attention A, value v and output o; see `attention_effect`.

    Args:
        attention: float32 `[Hkv, G, n, L]`, rows summing to 1 or, with sinks, less.
        values: `[Hkv, L, D]`.
        of_value, of_output: x and y, broadcast against the attention.

    Returns:
        float32 `[Hkv, L]`, not negative; sum over the queries, mean over the query heads of a kv head.
    """
    values, output = values.float(), attention @ values[:, None].float()
    of_value, of_output = attention * of_value, attention * of_output
    # Multiplied out, so that no tensor has both a dimension for queries and one for head size and tokens.
    squares = of_value.square().sum(dim=(1, 2)) * values.square().sum(dim=-1)
    mixed = (torch.einsum("hgnl,hgnd->hld", of_value * of_output, output) * values).sum(dim=-1)
    of_outputs = torch.einsum("hgnl,hgn->hl", of_output.square(), output.square().sum(dim=-1))
    return ((squares - 2 * mixed + of_outputs) / attention.shape[1]).clamp(min=0)


def output_error(attention: Tensor, values: Tensor) -> Tensor:
    """Compute `Effect.OUTPUT` from attention `[Hkv, G, n, L]` and values `[Hkv, L, D]`: float32 `[Hkv, L]`."""
    one = torch.ones((), device=attention.device)
    return output_change(attention, values, one, one)
