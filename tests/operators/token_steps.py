"""Random steps of a few requests, as inputs of the operators that read token ids."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStep(NamedTuple):
    """Token ids `[T]`, int32 or int64; spans int64 `[4, R]`; and the end of the last span, before T."""

    ids: Tensor
    spans: Tensor
    end: int


def token_step(draw: random.Random, generator: torch.Generator, position: list[int], vocabulary: int) -> TokenStep:
    """Draw the next step of some requests; `position` counts their tokens so far and is updated."""
    chosen = draw.sample(range(len(position)), draw.randint(1, len(position)))
    spans, begin = [], 0
    for slot in chosen:
        begin += draw.randint(0, 3)  # tokens of unmanaged requests
        number = draw.choice((1, 1, 2, 7, 40, 130))
        spans.append((slot, begin, number, position[slot]))
        position[slot] += number
        begin += number
    ids = torch.randint(vocabulary, (begin + 2,), generator=generator)
    ids = ids.to(draw.choice((torch.int32, torch.int64)))
    return TokenStep(ids, torch.tensor(spans).T.contiguous(), begin)
