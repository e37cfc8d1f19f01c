"""Sums over queries follow their tokens, as a dictionary by token would."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from skipkv_vllm import ops
from skipkv_vllm.worker.signals.attention_mass import AttentionSums, Span

LAYERS, HEADS, BLOCK = 2, 3, 4
CPU = torch.device("cpu")


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


def sums_of(kinds: int, num_blocks: int = 400) -> AttentionSums:
    return AttentionSums((kinds, LAYERS, HEADS, BLOCK), num_blocks, CPU)


def together(parts: list[Tensor]) -> Tensor:
    """Pad tensors `[K, layers, H, N]` with zeros to one `[K, R, layers, H, N]`."""
    most = max(part.shape[-1] for part in parts)
    return torch.stack([torch.nn.functional.pad(part, (0, most - part.shape[-1])) for part in parts], dim=1)


def kept_sums(found: Tensor, kept: Tensor) -> Tensor:
    """Move sums `[K, layers, H, N]` as a compaction moves their tokens."""
    keep = int(kept[0, 0].sum())
    source, hole, valid = ops.move_list(kept, keep)
    found = torch.nn.functional.pad(found, (0, 1))  # where padding goes
    source, target = (x.expand(len(found), *x.shape) for x in (source, torch.where(valid, hole, found.shape[-1] - 1)))
    return found.scatter(-1, target, found.gather(-1, source))[..., :keep]


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("kinds", [1, 2])
def test_sums_follow_their_tokens(kinds, decay):
    """Several requests grow together, are compacted, and grow again, in blocks that others gave back."""
    chance, generator = random.Random(kinds), torch.Generator().manual_seed(kinds)
    sums, requests = sums_of(kinds, 8), {row: ByToken(kinds) for row in (4, 0, 1)}
    for _ in range(12):
        names = chance.sample(list(requests), chance.randint(1, 3))
        found = []
        for row in names:
            requests[row].write(chance.choice([1, 3, BLOCK, 25]))
            found.append(torch.rand(kinds, LAYERS, HEADS, requests[row].length, generator=generator))
            requests[row].add(found[-1])
        spans = [Span(row, 0, requests[row].length) for row in names]
        sums.add(spans, together(found))
        wanted = together([requests[row].expected() for row in names])
        held = sums.read(spans, wanted.shape[-1])
        torch.testing.assert_close(held, wanted)
        if chance.random() < 0.6:
            spans, parts = [], []
            for i, row in enumerate(names):
                length = requests[row].length
                keep = chance.randint(1, length)
                kept = choose(length, keep, generator)
                parts.append(decay * kept_sums(held[:, i, ..., :length], kept))
                requests[row].compact(kept, decay)
                spans.append(Span(row, 0, keep))
            sums.replace(spans, together(parts))
        for row, request in requests.items():
            if request.length:
                torch.testing.assert_close(
                    sums.read([Span(row, 0, request.length)], request.length)[:, 0], request.expected()
                )
                assert sums.num_blocks(row) == -(-request.length // BLOCK)
    assert sum(-(-request.length // BLOCK) for request in requests.values()) > 8, "no block had to be added"


def test_tokens_in_slots_that_others_left_begin_at_zero():
    sums = sums_of(1)
    sums.add([Span(0, 0, 10)], torch.ones(1, 1, LAYERS, HEADS, 10))
    sums.replace([Span(0, 0, 5)], torch.ones(1, 1, LAYERS, HEADS, 5))
    sums.add([Span(0, 0, 10)], torch.zeros(1, 1, LAYERS, HEADS, 10))
    assert torch.equal(sums.read([Span(0, 0, 10)], 10), (torch.arange(10) < 5).float().expand(1, 1, LAYERS, HEADS, -1))


def test_protected_tokens_have_no_blocks():
    sums = sums_of(1)
    sums.add([Span(0, 9, 14), Span(1, 0, 3)], torch.ones(1, 2, LAYERS, HEADS, 14))
    assert (sums.num_blocks(0), sums.num_blocks(1)) == (2, 1)
    found = sums.read([Span(0, 9, 14)], 14)
    assert not found[..., :8].any()
    assert (found[..., 8:] == 1).all()


def test_what_was_never_counted_is_zero():
    sums = sums_of(2)
    # Whatever lies in the block that stands in for those that do not exist.
    sums.add([Span(0, 0, 3)], torch.full((2, 1, LAYERS, HEADS, 20), torch.inf))
    assert not sums.read([Span(3, 0, 7)], 7).any()


def test_a_request_is_forgotten_alone():
    sums, found = sums_of(2, 4), torch.ones(2, 1, LAYERS, HEADS, 7)
    sums.add([Span(0, 0, 7)], found)
    sums.add([Span(1, 0, 7)], found)
    sums.forget(0)
    sums.forget(5)
    assert not sums.read([Span(0, 0, 7)], 7).any()
    assert torch.equal(sums.read([Span(1, 0, 7)], 7), found)
    # The next request takes the blocks and finds them empty.
    sums.add([Span(2, 0, 7)], found)
    assert torch.equal(sums.read([Span(2, 0, 7)], 7), found)
    assert len(sums._entries) == 5
