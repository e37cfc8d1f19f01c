"""Sums over queries follow their tokens, as a dictionary by token would."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from skipkv_vllm import ops
from skipkv_vllm.worker.signals.attention_mass import GROWTH, AttentionSums

LAYERS, HEADS = 2, 3


class ByToken:
    """Expected content of one request: for each layer and head a list of tokens by slot, and a sum for each token."""

    def __init__(self, kinds: int) -> None:
        self.kinds, self.written = kinds, 0
        self.held: dict[tuple[int, int], list[int]] = {(i, h): [] for i in range(LAYERS) for h in range(HEADS)}
        self.sums: dict[tuple[int, int, int, int], float] = {}

    @property
    def length(self) -> int:
        return len(self.held[0, 0])

    def write(self, count: int) -> None:
        """Append new tokens behind the held ones."""
        for tokens in self.held.values():
            tokens += range(self.written, self.written + count)
        self.written += count

    def add(self, found: Tensor) -> None:
        for (i, h), tokens in self.held.items():
            for slot, token in enumerate(tokens):
                for k in range(self.kinds):
                    self.sums[k, i, h, token] = self.sums.get((k, i, h, token), 0.0) + float(found[k, i, h, slot])

    def compact(self, kept: Tensor, decay: float) -> None:
        """Keep the tokens in these slots `[layers, H, length]`; those beyond the first slots fill gaps in order."""
        self.sums = {key: decay * value for key, value in self.sums.items()}
        for (i, h), tokens in self.held.items():
            keep = int(kept[i, h].sum())
            gaps = [slot for slot in range(keep) if not kept[i, h, slot]]
            movers = [slot for slot in range(keep, len(tokens)) if kept[i, h, slot]]
            for gap, mover in zip(gaps, movers, strict=True):
                tokens[gap] = tokens[mover]
            del tokens[keep:]

    def expected(self) -> Tensor:
        found = torch.zeros(self.kinds, LAYERS, HEADS, self.length)
        for k, i, h, slot in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
            found[k, i, h, slot] = self.sums.get((k, i, h, self.held[i, h][slot]), 0.0)
        return found


def choose(length: int, keep: int, generator: torch.Generator) -> Tensor:
    ranks = torch.rand(LAYERS, HEADS, length, generator=generator).argsort(dim=-1)
    return ranks < keep


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("kinds", [1, 2])
def test_sums_follow_their_tokens(kinds, decay):
    """Several requests of one table grow past their buffers, are compacted, and grow again."""
    chance, generator = random.Random(kinds), torch.Generator().manual_seed(kinds)
    sums, requests = AttentionSums(), {row: ByToken(kinds) for row in (4, 0, 1)}
    for _ in range(6):
        for row, request in requests.items():
            request.write(chance.choice([1, 7, GROWTH // 2, GROWTH]))
            found = torch.rand(kinds, LAYERS, HEADS, request.length, generator=generator)
            sums.add(row, list(found))
            request.add(found)
            torch.testing.assert_close(sums.read(row, len(found), found[0]), request.expected())
            if chance.random() < 0.6:
                keep = chance.randint(1, request.length)
                kept = choose(request.length, keep, generator)
                source, hole, valid = ops.move_list(kept, keep)
                sums.move(row, keep, torch.where(valid, source, 0), torch.where(valid, hole, keep), decay)
                request.compact(kept, decay)
            torch.testing.assert_close(sums.read(row, len(found), found[0, ..., : request.length]), request.expected())
    assert max(request.written for request in requests.values()) > 2 * GROWTH


def test_tokens_in_slots_that_others_left_begin_at_zero():
    sums, found = AttentionSums(), torch.ones(1, LAYERS, HEADS, 10)
    sums.add(0, list(found))
    kept = torch.zeros(LAYERS, HEADS, 10, dtype=torch.bool)
    kept[..., 5:] = True
    source, hole, valid = ops.move_list(kept, 5)
    sums.move(0, 5, source, torch.where(valid, hole, 5), decay=1.0)
    assert (
        sums.read(0, len(found), found[0]).tolist()
        == (torch.arange(10) < 5).float().expand(1, LAYERS, HEADS, -1).tolist()
    )


def test_what_was_never_counted_is_zero():
    assert not AttentionSums().read(3, 2, torch.ones(LAYERS, HEADS, 7)).any()


def test_a_request_is_forgotten_alone():
    sums, found = AttentionSums(), torch.ones(2, LAYERS, HEADS, 7)
    sums.add(0, list(found))
    sums.add(1, list(found))
    sums.forget(0)
    sums.forget(5)
    assert not sums.read(0, len(found), found[0]).any()
    assert torch.equal(sums.read(1, len(found), found[0]), found)
    # The next request in this row may use another method.
    sums.forget(1)
    assert sums.read(1, 1, found[0]).shape == (1, LAYERS, HEADS, 7)
