"""Inputs for `vector_norms`, `pool_neighbours` and `central_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.ops import torch_backend
from skipkv_vllm.ops.paging import layer_pages
from tests.operators.cases import GARBAGE, MeasureCase, Pages, make_keys, positions_of, tables


class Norms(NamedTuple):
    """Arguments of `vector_norms`, in order."""

    caches: list[Tensor]
    pointers: Tensor
    layout: int
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    values: bool
    norm: int
    part: int
    weights: Tensor | None


WHOLE = 2**30
"""A part that no row exceeds."""


@dataclass(frozen=True)
class NormsCase:
    """A call of `vector_norms`.

    Attributes:
        held: the tokens.
        values, norm, part: see the operator.
        weighted: whether the centre is a sum with weights, which add up to 1 over a row.
    """

    held: MeasureCase = field(default_factory=MeasureCase)
    values: bool = False
    norm: int = 2
    part: int = 0
    weighted: bool = False

    @property
    def pages(self) -> Pages:
        return self.held.pages

    def build(self) -> Norms:
        """The arguments, on the CPU."""
        held, weights = self.held.build(), None
        if self.weighted:
            generator = torch.Generator().manual_seed(self.held.seed)
            weights = torch.rand(held.positions.shape, generator=generator)
            for row, length in zip(weights, self.held.lengths, strict=True):
                row[..., :length] /= row[..., :length].sum(-1, keepdim=True)
                row[..., length:] = float("nan")
        return Norms(*held[:6], self.values, self.norm, self.part, weights)


class Pooling(NamedTuple):
    """Arguments of `pool_neighbours`, in order."""

    scores: Tensor
    positions: Tensor
    num_resident: Tensor
    window: int
    pool: int


@dataclass(frozen=True)
class PoolCase:
    """A call of `pool_neighbours`; `shape` is layers and kv heads."""

    lengths: Sequence[int] = (75, 33)
    window: int = 8
    pool: int = 7
    positions: str = "shuffled"
    shape: tuple[int, int] = (2, 3)
    seed: int = 0

    def build(self) -> Pooling:
        """The arguments, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.lengths), *self.shape, max(self.lengths) + 3)
        scores = torch.randn(shape, generator=generator)
        for row, length in zip(scores, self.lengths, strict=True):
            row[..., length:] = float("nan")
        positions = positions_of(shape, self.lengths, self.positions, generator)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return Pooling(scores, positions, lengths, self.window, self.pool)


class Central(NamedTuple):
    """Arguments of `central_tokens`, in order."""

    caches: list[Tensor]
    pointers: Tensor
    layout: int
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    begin: Tensor
    end: Tensor
    quota: Tensor
    longest: int


@dataclass(frozen=True)
class CentralCase:
    """A call of `central_tokens`.

    Attributes:
        lengths, written: of each request, its held tokens and all tokens of its text.
        begin, window: first position of a segment, and newest tokens without one.
        longest: tokens of a segment.
        quotas: what segments may keep, in turn.
        shuffled: whether slots are out of order.
    """

    pages: Pages = field(default_factory=Pages)
    lengths: Sequence[int] = (75, 133)
    written: Sequence[int] = (140, 201)
    begin: int = 5
    window: int = 8
    longest: int = 32
    quotas: Sequence[int] = (4, 32, 8, 1, 16, 2)
    keys: str = "random"
    shuffled: bool = True
    seed: int = 0

    def build(self) -> Central:
        """The arguments, on the CPU; rounding decides nowhere which tokens are chosen."""
        for seed in range(self.seed, self.seed + 50):
            arguments = self._draw(torch.Generator().manual_seed(seed))
            wanted = torch_backend.central_tokens(*arguments)
            if all(torch.equal(torch_backend.central_tokens(*self._jittered(arguments, k)), wanted) for k in (1, 2)):
                return arguments
        raise AssertionError("no keys that are clear")

    def _draw(self, generator: torch.Generator) -> Central:
        pages, n = self.pages, max(self.lengths) + 3
        table = tables(self.lengths, pages.size, generator)
        cache = pages.empty(int(table.max()) + 1)
        for row, length in zip(table, self.lengths, strict=True):
            pages.write_keys(
                cache, row, make_keys(self.keys, (pages.layers, pages.heads, length, pages.dim), generator)
            )
        shape = (len(self.lengths), pages.layers, pages.heads, n)
        positions = torch.full(shape, GARBAGE, dtype=torch.int32)
        for r, (length, written) in enumerate(zip(self.lengths, self.written, strict=True)):
            for row in positions[r].view(-1, n):
                held = torch.randperm(written - self.window, generator=generator)[: length - self.window]
                held = torch.cat([held, torch.arange(written - self.window, written)])
                row[:length] = held if self.shuffled else held.sort().values
        count = max(1, -(-(max(self.written) - self.window - self.begin) // self.longest))
        quota = torch.tensor(self.quotas, dtype=torch.int32).repeat(len(self.lengths) * count)
        every = torch.ones(len(self.lengths), dtype=torch.int32)
        return Central(
            *cache,
            table,
            positions,
            torch.tensor(self.lengths, dtype=torch.int32),
            self.begin * every,
            torch.tensor(self.written, dtype=torch.int32) - self.window,
            quota[: len(self.lengths) * count].view(-1, count),
            self.longest,
        )

    def _jittered(self, arguments: Central, seed: int) -> Central:
        """Change every key a little, in caches of float32."""
        generator = torch.Generator().manual_seed(seed)
        pages = Pages(self.pages.layout, torch.float32, "BHNC", *self._sizes())
        cache = pages.empty(arguments.caches[0].shape[0])
        for row, length in zip(arguments.table, self.lengths, strict=True):
            used = row[: -(-length // self.pages.size)].long()
            keys = torch.stack(
                [layer_pages(c, self.pages.layout).keys.read_pages(used, length).float() for c in arguments.caches]
            )
            # Equal keys stay equal.
            noise = torch.randn(self.pages.dim, generator=generator)
            pages.write_keys(cache, row, keys * (1 + 1e-5 * noise))
        return arguments._replace(caches=cache.caches, pointers=cache.pointers)

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.pages.layers, self.pages.heads, self.pages.size, self.pages.dim
