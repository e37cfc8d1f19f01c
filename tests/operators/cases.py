"""Inputs for the operators: pages of every layout filled with tokens, and garbage that must not be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.ops.paging import Layout, PagedCache, layer_pages

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

GARBAGE = -(2**30)
"""Page id or position that must not be read."""

ORDERS = ("BHNC", "BNHC", "HBNC", "NBHC")
"""Orders of the dimensions pages, heads, tokens and content in memory; packed layouts allow the first and third."""


@dataclass(frozen=True)
class Pages:
    """Description of caches.

    Attributes:
        layout, dtype, order: how a page is packed, its elements, and how dimensions lie in memory.
        layers, heads, size, dim: L, H, P and D.
    """

    layout: Layout = Layout.ROWS
    dtype: torch.dtype = torch.float32
    order: str = "BHNC"
    layers: int = 2
    heads: int = 2
    size: int = 16
    dim: int = 64

    def empty(self, pages: int) -> PagedCache:
        """Caches full of NaN."""
        lengths = {"B": pages, "H": self.heads, "N": self.size, "C": 2 * self.dim}
        if self.layout is Layout.LATENT:
            lengths["C"] = self.dim
        fill = float("nan") if self.dtype.is_floating_point else 255
        caches = []
        for _ in range(self.layers):
            physical = torch.full([lengths[name] for name in self.order], fill, dtype=self.dtype)
            caches.append(physical.permute([self.order.index(name) for name in "BHNC"]))
        return PagedCache.of(caches, self.layout)

    def write_keys(self, cache: PagedCache, table: Tensor, keys: Tensor) -> None:
        """Write keys `[L, H, N, D]` of a request to the pages of `table`; values stay unchanged."""
        self._write(cache, table, keys, "keys")

    def write_values(self, cache: PagedCache, table: Tensor, values: Tensor) -> None:
        """Write values likewise; those of latents are part of the keys."""
        if self.layout is not Layout.LATENT:
            self._write(cache, table, values, "values")

    def _write(self, cache: PagedCache, table: Tensor, vectors: Tensor, where: str) -> None:
        slot = torch.arange(vectors.shape[2])
        page, offset = table[slot // self.size].long(), slot % self.size
        for each, layer_vectors in zip(cache.caches, vectors, strict=True):
            view = getattr(layer_pages(each, self.layout), where)
            for h in range(self.heads):
                view.scatter(page, torch.tensor(h), offset, layer_vectors[h].to(self.dtype))


def draw_pages(data: st.DataObject, most_heads: int) -> Pages:
    """Draw any pages that the CPU operators support, for property tests."""
    layout = data.draw(st.sampled_from(Layout))
    return Pages(
        layout,
        data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, *FP8))),
        data.draw(st.sampled_from(ORDERS if layout in (Layout.ROWS, Layout.LATENT) else ORDERS[::2])),
        layers=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, most_heads)),
        size=data.draw(st.sampled_from((16, 32, 64) if layout is Layout.AMX else (1, 2, 3, 16, 32))),
        dim=data.draw(st.sampled_from((96, 128, 576) if layout is Layout.LATENT else (32, 64, 96, 128))),
    )


def tables(lengths: Sequence[int], size: int, generator: torch.Generator, width: int | None = None) -> Tensor:
    """Shuffled pages for requests of these lengths, int32 `[R, pages]`; page 0 is unused, the rest garbage."""
    needed = [-(-length // size) for length in lengths]
    ids = torch.randperm(sum(needed), generator=generator) + 1
    table = torch.full((len(lengths), width or max(needed)), GARBAGE, dtype=torch.int32)
    for row, part in zip(table, ids.split(needed), strict=True):
        row[: part.shape[0]] = part
    return table


def positions_of(shape: Sequence[int], lengths: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    """Positions `[R, L, H, N]`, int32, garbage past each length.

    Args:
        kind: "sorted", "runs" (survivors with moved tokens among them, then new ones) or "shuffled".
    """
    requests, layers, heads, n = shape
    positions = torch.full((requests, layers, heads, n), GARBAGE, dtype=torch.int32)
    for r, length in enumerate(lengths):
        for row in positions[r].view(-1, n):
            if kind == "sorted":
                row[:length] = torch.arange(length)
                continue
            chosen = torch.randperm(4 * length + 100_000, generator=generator)[:length]
            if kind == "runs":
                chosen = chosen.sort().values
                moved = torch.randperm(length, generator=generator)[: length // 4]
                chosen[moved] = chosen[moved.sort().values]
            row[:length] = chosen
    return positions


def make_keys(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Keys `[L, H, N, D]`.

    Args:
        kind: "random"; "clusters", many similar ones; "copies", few different ones; "zeros", a third of them zero;
            "equal", all the same; "none", all zero; "late", the first half similar to each other only; "thin", in few
            dimensions, so similar to few others each; "bridges", the first quarter similar to the last one and to
            one key between, which is similar to nothing else; "ends", many similar ones, but only in the last quarter
            of their dimensions.
    """
    keys = torch.randn(*shape, generator=generator)
    layers, heads, n, dim = shape
    if kind == "clusters":
        centres = torch.randn(layers, heads, 6, dim, generator=generator)
        keys = 0.5 * keys + centres[:, :, torch.randint(6, (n,), generator=generator)]
    elif kind == "copies":
        keys = keys[:, :, torch.randint(min(5, n), (n,), generator=generator)]
    elif kind == "zeros":
        keys[:, :, torch.rand(n, generator=generator) < 1 / 3] = 0
    elif kind == "equal":
        keys[:] = keys[:, :, :1].clone()
    elif kind == "none":
        keys.zero_()
    elif kind == "thin":
        keys = keys[..., :3] @ torch.randn(layers, heads, 3, dim, generator=generator)
    elif kind == "bridges":
        alone = keys[:, :, n // 2 : n // 2 + 1]
        keys[:, :, n - n // 4 :] = keys[:, :, -1:] + 0.1 * keys[:, :, n - n // 4 :]
        keys[:, :, : n // 4] = alone + keys[:, :, -1:] + 0.1 * keys[:, :, : n // 4]
    elif kind == "ends":
        part = dim // 4
        centres = torch.randn(layers, heads, 6, part, generator=generator)
        keys[..., dim - part :] = 3 * centres[:, :, torch.randint(6, (n,), generator=generator)]
    elif kind == "late":
        keys[:, :, : n // 2] = 0.2 * keys[:, :, : n // 2] + keys[:, :, :1]
    return keys


class Scoring(NamedTuple):
    """Arguments of `score_tokens`, in order."""

    caches: list[Tensor]
    pointers: Tensor
    layout: int
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    queries: Tensor
    penalty: Tensor | None
    pool: int
    mix: float
    threshold: float


@dataclass(frozen=True)
class ScoreCase:
    """A call of `score_tokens`."""

    pages: Pages = field(default_factory=Pages)
    lengths: Sequence[int] = (75, 33)
    group: int = 2
    window: int = 8
    pool: int = 7
    mix: float = 0.1
    threshold: float = 0.3
    keys: str = "random"
    positions: str = "runs"
    penalty: bool = False
    seed: int = 0

    def build(self) -> Scoring:
        """The arguments, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        pages, n = self.pages, max(self.lengths) + 3
        table = tables(self.lengths, pages.size, generator)
        cache = pages.empty(int(table.max()) + 1)
        for row, length in zip(table, self.lengths, strict=True):
            keys = make_keys(self.keys, (pages.layers, pages.heads, length, pages.dim), generator)
            pages.write_keys(cache, row, keys)
        shape = (len(self.lengths), pages.layers, pages.heads, n)
        queries = torch.randn(*shape[:2], self.window, pages.heads * self.group, pages.dim, generator=generator)
        arguments = Scoring(
            *cache,
            table,
            positions_of(shape, self.lengths, self.positions, generator),
            torch.tensor(self.lengths, dtype=torch.int32),
            queries if pages.dtype.itemsize == 1 else queries.to(pages.dtype),
            torch.rand(shape, generator=generator) if self.penalty else None,
            self.pool,
            self.mix,
            self.threshold,
        )
        return arguments._replace(threshold=self._clear_threshold(arguments))

    def _clear_threshold(self, arguments: Scoring) -> float:
        """Return a threshold near the wanted one and so far from every cosine that rounding cannot decide."""
        cosines, zeros = [], []
        for row, length in zip(arguments.table, self.lengths, strict=True):
            for cache in arguments.caches:
                held = layer_pages(cache, self.pages.layout).keys
                keys = held.read_pages(row[: -(-length // self.pages.size)].long(), length).double()
                unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
                pairs = torch.ones(length, length, dtype=torch.bool).triu(1)
                cosines.append((unit @ unit.transpose(1, 2))[:, pairs].flatten())
                is_zero = (keys == 0).all(dim=-1)
                zeros.append((is_zero[:, None] | is_zero[:, :, None])[:, pairs].flatten())
        # Cosines with zero keys are exactly zero on every machine.
        every, with_zero = torch.cat(cosines), torch.cat(zeros)
        if self.threshold == 0 and (every[with_zero.logical_not()].abs() > 3e-7).all():
            return 0.0
        for step in range(2000):
            threshold = self.threshold - math.copysign(step * 1e-6, self.threshold)
            if (every - threshold).abs().min() > 3e-7:
                return threshold
        raise AssertionError(f"no clear threshold near {self.threshold}")


class Measuring(NamedTuple):
    """Arguments of `measure_attention` without the last one, in order."""

    caches: list[Tensor]
    pointers: Tensor
    layout: int
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    queries: Tensor
    num_queries: Tensor
    newest: Tensor
    sinks: Tensor | None = None

    def keys(self) -> tuple[Any, ...]:
        """Arguments of `key_similarity`."""
        return (*self[:4], self.num_resident, self.positions.shape[-1])


@dataclass(frozen=True)
class MeasureCase:
    """A call of `measure_attention` or of `key_similarity`.

    Attributes:
        lengths, counted: of each request, its tokens and its queries that count.
        window: n.
        ahead: how far the last query is from the newest token; a negative number hides tokens from all queries.
        sinks: whether there are attention sinks: of the query heads in turn one that takes nothing, one like a token,
            and one that takes nearly or, where its exponential overflows, really all.
    """

    pages: Pages = field(default_factory=Pages)
    lengths: Sequence[int] = (75, 33)
    counted: Sequence[int] = (8, 5)
    window: int = 8
    group: int = 2
    keys: str = "random"
    positions: str = "runs"
    ahead: int = 0
    sinks: bool = False
    seed: int = 0

    def build(self) -> Measuring:
        """The arguments, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        pages, n = self.pages, max(self.lengths) + 3
        table = tables(self.lengths, pages.size, generator)
        cache = pages.empty(int(table.max()) + 1)
        for row, length in zip(table, self.lengths, strict=True):
            shape = (pages.layers, pages.heads, length, pages.dim)
            pages.write_keys(cache, row, make_keys(self.keys, shape, generator))
            pages.write_values(cache, row, torch.randn(shape, generator=generator))
        shape = (len(self.lengths), pages.layers, pages.heads, n)
        queries = torch.randn(*shape[:2], self.window, pages.heads * self.group, pages.dim, generator=generator)
        positions = positions_of(shape, self.lengths, self.positions, generator)
        for length, row in zip(self.lengths, positions, strict=True):
            oldest = row[..., :length].argmin(-1, keepdim=True)
            row.scatter_(-1, oldest, 0)  # each query sees this one
        newest = positions.amax(dim=(1, 2, 3)) + self.ahead
        heads = pages.heads * self.group
        strengths = torch.tensor([-torch.inf, 1.5, 20.0, 200.0]).repeat(-(-pages.layers * heads // 4))
        sinks = strengths[: pages.layers * heads].view(pages.layers, heads) if self.sinks else None
        return Measuring(
            *cache,
            table,
            positions,
            torch.tensor(self.lengths, dtype=torch.int32),
            queries if pages.dtype.itemsize == 1 else queries.to(pages.dtype),
            torch.tensor(self.counted, dtype=torch.int32),
            newest.clamp(min=self.window - 1).int(),
            sinks,
        )


class Compaction(NamedTuple):
    """Arguments of `compact_pages`, in order."""

    caches: list[Tensor]
    pointers: Tensor
    layout: int
    sidecar: Tensor
    positions: Tensor
    source_table: Tensor
    target_table: Tensor
    num_keep: Tensor
    source: Tensor
    hole: Tensor
    count: Tensor

    def copy(self) -> Compaction:
        """With caches of its own, of the same strides."""
        caches = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=c.device) for c in self.caches]
        for to, cache in zip(caches, self.caches, strict=True):
            to.copy_(cache)
        pointers = torch.tensor([c.data_ptr() for c in caches], device=self.pointers.device)
        return self._replace(caches=caches, pointers=pointers, sidecar=self.sidecar.clone())


@dataclass(frozen=True)
class CompactCase:
    """A call of `compact_pages`.

    Attributes:
        lengths, keeps: of each request, before and after.
        shared: leading pages that all requests share, and that stay as they are.
        fresh: share of the other target pages that are fresh.
    """

    pages: Pages = field(default_factory=Pages)
    lengths: Sequence[int] = (75, 49)
    keeps: Sequence[int] = (40, 33)
    shared: int = 0
    fresh: float = 0.4
    seed: int = 0

    def build(self) -> Compaction:
        """The arguments, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        pages, requests, n = self.pages, len(self.lengths), max(self.lengths) + 3
        source_table = tables(self.lengths, pages.size, generator)
        source_table[:, : self.shared] = source_table[0, : self.shared].clone()
        used = [-(-keep // pages.size) for keep in self.keeps]
        target_table = torch.full((requests, max(used) + 1), GARBAGE, dtype=torch.int32)
        first_fresh = int(source_table.max()) + 1
        spare = first_fresh
        for row, source, number in zip(target_table, source_table, used, strict=True):
            row[:number] = source[:number]
            for i in range(self.shared, number):
                if torch.rand((), generator=generator) < self.fresh:
                    row[i], spare = spare, spare + 1
        cache = pages.empty(spare + 1)
        for each in cache.caches:
            noise = torch.randint(0, 120, each.shape, generator=generator)
            each.copy_(noise.to(each.dtype))
        shape = (requests, pages.layers, pages.heads, n)
        sidecar = torch.randint(0, 99, (pages.layers, spare + 1, pages.heads, pages.size), generator=generator)
        positions = positions_of(shape, self.lengths, "shuffled", generator)
        # Requests that share a page agree about what it holds; else the last writer of its sidecar would decide.
        positions[..., : self.shared * pages.size] = torch.arange(self.shared * pages.size, dtype=torch.int32)
        most = max(1, *(min(k, length - k) for k, length in zip(self.keeps, self.lengths, strict=True)))
        source, hole = (torch.zeros(*shape[:3], most, dtype=torch.int32) for _ in range(2))
        count = torch.zeros(shape[:3], dtype=torch.int32)
        pinned = self.shared * pages.size
        for r, (length, keep) in enumerate(zip(self.lengths, self.keeps, strict=True)):
            for place in torch.cartesian_prod(torch.arange(pages.layers), torch.arange(pages.heads)):
                i, h = place.tolist()
                moves = int(torch.randint(0, min(keep - pinned, length - keep) + 1, (), generator=generator))
                holes = torch.randperm(keep - pinned, generator=generator)[:moves].sort().values + pinned
                movers = torch.randperm(length - keep, generator=generator)[:moves].sort().values + keep
                source[r, i, h, :moves], hole[r, i, h, :moves], count[r, i, h] = movers.int(), holes.int(), moves
        return Compaction(
            *cache,
            sidecar.int(),
            positions,
            source_table,
            target_table,
            torch.tensor(self.keeps, dtype=torch.int32),
            source,
            hole,
            count,
        )
