"""Sentences: where they end, their embeddings, and the penalties of sentences that later ones repeat."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from ..torch_backend import RULES
from .launch import ceil_div, common_chunk, kernels, power_of_two, stride_of


def track_sentences(
    token_ids: Tensor,
    hidden: Tensor | None,
    spans: Tensor,
    num_tokens: int,
    delimiters: Tensor,
    merge: bool,
    ends: Tensor,
    count: Tensor,
    after_delimiter: Tensor,
    open_length: Tensor,
    open_sum: Tensor,
    embeddings: Tensor,
    text: Tensor,
) -> None:
    """See `torch_backend.track_sentences`."""
    requests, held = spans.shape[1], embeddings.shape[1] - 1
    if requests == 0:
        return
    states = (ends[0], text, open_sum, embeddings) if hidden is not None else (ends[0], text)
    if not all(state.is_contiguous() for state in states):
        raise KVPolicyError("track_sentences: rows of ends, text, open_sum and embeddings must be contiguous")
    if hidden is not None and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    width, stride = (1, 0) if hidden is None else (hidden.shape[1], stride_of(hidden, 0))
    chunk = common_chunk(width, stride)
    kernels("sentences").track[(requests,)](
        *(token_ids, open_sum if hidden is None else hidden, spans.contiguous(), delimiters.view(torch.int8)),
        *(ends, count, after_delimiter.view(torch.int8), open_length, open_sum, embeddings, text),
        *(requests, stride // chunk, ends.stride(0), held, text.shape[1]),
        chunk=chunk,
        width=width,
        merge=int(merge),
        embeds=hidden is not None,
        keeps_text=text.shape[1] > 0,
        tokens=64,
        block=min(1024, power_of_two(width)),
    )


def sentence_similarity(
    embeddings: Tensor,
    rows: Tensor,
    count: Tensor,
    compared: Tensor,
    penalties: Tensor,
    threshold: float,
    rule: int,
) -> None:
    """See `torch_backend.sentence_similarity`."""
    held, hidden, block = embeddings.shape[1] - 1, embeddings.shape[2], 32
    if embeddings.stride(2) != 1 or penalties.stride(1) != 1:
        raise KVPolicyError(
            f"sentence_similarity: embeddings have strides {embeddings.stride()} and penalties {penalties.stride()}; "
            "expected a contiguous last dimension"
        )
    if rows.numel() * held > 0:
        chunk = common_chunk(*embeddings.stride()[:2])
        strides = (*(stride // chunk for stride in embeddings.stride()[:2]), penalties.stride(0))
        kernels("sentences").compare_sentences[(rows.numel() * ceil_div(held, block),)](
            *(embeddings, rows, count, compared, penalties, held, *strides, threshold),
            hidden=hidden,
            latest=RULES[rule] == "last",
            block=block,
            columns=16,
            depth=min(64, max(16, power_of_two(hidden))),
            chunk=chunk,
        )
    # After the kernel, in which every program of a request reads the old value.
    compared.index_copy_(0, rows, count.index_select(0, rows))


def token_penalties(ends: Tensor, penalties: Tensor, first: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """See `torch_backend.token_penalties`."""
    positions = positions.contiguous()
    out = torch.empty_like(positions, dtype=torch.float32)
    most = ends.shape[1]
    if ends.stride(1) != 1 or penalties.stride(1) != 1:
        raise KVPolicyError(
            f"token_penalties: ends have strides {ends.stride()} and penalties {penalties.stride()}; "
            "expected a contiguous last dimension"
        )
    if out.numel() > 0:
        kernels("held").look_up_penalties[(ceil_div(out.numel(), 1024),)](
            *(ends, penalties, first.contiguous(), rows.contiguous(), positions, out),
            *(out.numel(), positions[0].numel(), most, ends.stride(0), penalties.stride(0)),
            halvings=(most - 1).bit_length(),
            block=1024,
        )
    return out
