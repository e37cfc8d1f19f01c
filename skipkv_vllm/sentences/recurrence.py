"""Find which tokens of a sentence recur word for word in later text; from token ids alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAM = 6
"""Tokens of a phrase. Shorter phrases recur by chance; longer ones miss repetitions in which a number has changed."""

_MULTIPLIERS = (
    *(-0x61C8864680B583EB, 0x2545F4914F6CDD1D, -0x4B47D0C5A1A53CBB),
    *(0x5851F42D4C957F2D, -0x40A7B892E31B1A47, 0x369DEA0F31A53F85),
)
"""Odd signed 64-bit numbers; the hash of a phrase is the sum of its token ids, each times one of them."""


def next_occurrence(token_ids: Tensor) -> Tensor:
    """Find the next occurrence of each phrase.

    Args:
        token_ids: integer `[R, T]`.

    Returns:
        int64 `[R, T]`: for each start of a phrase of `GRAM` tokens, the start of its next occurrence; T where the
        phrase does not recur or fewer tokens follow. Different phrases with the same 64-bit hash count as equal.
    """
    rows, length = token_ids.shape
    starts = max(0, length - GRAM + 1)
    if not starts:
        return torch.full((rows, length), length, dtype=torch.int64, device=token_ids.device)
    hashed = torch.zeros(rows, starts, dtype=torch.int64, device=token_ids.device)
    for i, multiplier in enumerate(_MULTIPLIERS):
        hashed.add_(token_ids[:, i : i + starts], alpha=multiplier)
    ordered, place = hashed.sort(dim=1, stable=True)
    follows = torch.full_like(place, length)
    follows[:, :-1] = torch.where(ordered[:, 1:] == ordered[:, :-1], place[:, 1:], length)
    found = torch.full((rows, length), length, dtype=torch.int64, device=token_ids.device)
    return found.scatter_(1, place, follows)


def repeated_tokens(token_ids: Tensor, is_text: Tensor) -> Tensor:
    """Find the tokens that are part of a phrase which recurs later.

    Args:
        token_ids: integer `[R, T]`; arbitrary where there is no text.
        is_text: bool `[R, T]`.

    Returns:
        bool `[R, T]`.
    """
    num_tokens = token_ids.shape[1]
    order = torch.arange(num_tokens, device=token_ids.device)
    # Use a different negative number at each place, so that no phrase that contains one recurs.
    follows = next_occurrence(torch.where(is_text, token_ids.long(), -1 - order))
    begun = (follows < num_tokens).int().cumsum(1)
    return begun > F.pad(begun, (GRAM, 0))[:, :num_tokens]


def repeated_shares(token_ids: Tensor, is_text: Tensor, ends: Tensor) -> Tensor:
    """Compute the share of each closed sentence's tokens that are part of a phrase which recurs later.

    Args:
        token_ids: integer `[R, T]`; arbitrary where there is no text.
        is_text: bool `[R, T]`.
        ends: int32 `[R, S]`, index of each sentence's last token, ascending; at least T past the closed sentences.

    Returns:
        float32 `[R, T]` for each token; 0 in the open sentence and where there is no text.
    """
    rows, num_tokens = token_ids.shape
    order = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device).expand(rows, -1).contiguous()
    number = torch.searchsorted(ends.contiguous(), order)
    zeros = torch.zeros(rows, num_tokens + 1, dtype=torch.float32, device=ends.device)
    repeated = zeros.scatter_add(1, number, repeated_tokens(token_ids, is_text).float())
    size = zeros.scatter_add(1, number, is_text.float())
    is_closed = number < (ends < num_tokens).sum(dim=1, keepdim=True)
    return torch.where(is_text & is_closed, (repeated / size.clamp(min=1)).gather(1, number), 0.0)
