"""Steering: the strength that each token of a step gets, and its addition to the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from .launch import ceil_div, common_chunk, kernels, power_of_two, stride_of


def track_thoughts(
    token_ids: Tensor,
    spans: Tensor,
    vocabulary: Tensor,
    keywords: Tensor,
    merge: bool,
    interval: int,
    strengths: Tensor,
    state: Tensor,
    written: int,
    choice: Tensor,
    coefficient: Tensor,
) -> None:
    """See `torch_backend.track_thoughts`."""
    requests, columns = spans.shape[1], state.shape[1]
    if not all(t.is_contiguous() for t in (vocabulary, keywords, strengths, state)):
        raise KVPolicyError("track_thoughts: vocabulary, keywords, strengths and state must be contiguous")
    choice[:written] = 0
    if requests > 0:
        kernels("thoughts").track[(requests,)](
            *(token_ids, spans.contiguous(), vocabulary, keywords, strengths, state, choice, coefficient),
            *(requests, keywords.shape[1], interval),
            merge=int(merge),
            columns=columns,
        )


def steer_add(hidden: Tensor, coefficient: Tensor, choice: Tensor, vectors: Tensor) -> Tensor:
    """See `torch_backend.steer_add`."""
    tokens, size = hidden.shape
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    out = torch.empty(tokens, size, dtype=hidden.dtype, device=hidden.device)
    if tokens > 0:
        block, strides = min(1024, power_of_two(size)), (stride_of(hidden, 0), stride_of(vectors, 0), size)
        chunk = common_chunk(*strides)
        kernels("tokens").add_steering[(tokens, ceil_div(size, block))](
            *(hidden, coefficient, choice, vectors, out, *(stride // chunk for stride in strides)),
            chunk=chunk,
            size=size,
            block=block,
        )
    return out
