"""Scoring and compaction of a request in vLLM's pages, by three implementations that take turns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.ops.paging import LayerPages, Layout, PagedCache, layer_pages

from . import rkv_style
from .measure import Work, gflops, gigabytes, interleaved, limits, medians, peak_memory

POOL, MIX, THRESHOLD = 7, 0.1, 0.5
"""The defaults of the policies."""

KEYS = {
    "distinct": "no two keys are similar, so every pair must be looked at",
    "similar": "keys fall into 24 groups of similar ones, so a search for the last similar key ends early",
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the run: those of an 8B model, except for the number of layers."""

    lengths: tuple[int, ...]
    buffer: int
    layers: int
    heads: int
    query_heads: int
    dim: int
    window: int
    page_size: int
    layout: str
    dtype: str
    repeats: int
    seconds: float

    def budget(self, length: int) -> int:
        """Tokens kept of a request that has filled its buffer."""
        return length - self.buffer


class Request(NamedTuple):
    """A request of L tokens that must shrink to the budget."""

    cache: PagedCache
    layers: list[LayerPages]
    table: Tensor
    positions: Tensor
    num_resident: Tensor
    queries: Tensor
    length: int

    def scoring(self) -> tuple[Any, ...]:
        """Arguments of `score_tokens`."""
        numbers = (self.table, self.positions, self.num_resident, self.queries, None, POOL, MIX, THRESHOLD)
        return (*self.cache, *numbers)


def make_request(settings: Settings, length: int, keys: str) -> Request:
    """Random keys of a kind of `KEYS`, all tokens in order, pages shuffled."""
    generator = torch.Generator().manual_seed(length)
    pages = -(-length // settings.page_size)
    dtype, layout = getattr(torch, settings.dtype), Layout[settings.layout.upper()]
    shape = (pages + 1, settings.heads, settings.page_size, 2 * settings.dim)
    cache = PagedCache.of([torch.zeros(shape, dtype=dtype) for _ in range(settings.layers)], layout)
    table = (torch.randperm(pages, generator=generator) + 1).int()
    layers = [layer_pages(each, layout) for each in cache.caches]
    slot, head = torch.arange(length), torch.arange(settings.heads)[:, None]
    page, offset = table[slot // settings.page_size].long(), slot % settings.page_size
    for layer, raw in zip(layers, cache.caches, strict=True):
        raw.normal_(generator=generator)
        values = torch.randn(settings.heads, length, settings.dim, generator=generator)
        if keys == "similar":
            centres = torch.randn(settings.heads, 24, settings.dim, generator=generator)
            values = 0.6 * values + centres[:, torch.randint(24, (length,), generator=generator)]
        layer.keys.scatter(page, head, offset, values.to(dtype))
    queries = torch.randn(
        1, settings.layers, settings.window, settings.query_heads, settings.dim, generator=generator
    ).to(dtype)
    positions = torch.arange(length, dtype=torch.int32).expand(1, settings.layers, settings.heads, -1).contiguous()
    return Request(cache, layers, table[None], positions, torch.tensor([length], dtype=torch.int32), queries, length)


def needed_flops(settings: Settings, length: int) -> int:
    """Multiplications and additions without which "distinct" keys cannot be scored: the cosine of every pair once,
    and the logits of the window's queries."""
    group = settings.query_heads // settings.heads
    pairs = length * (length - 1) // 2
    logits = settings.window * group * (length - settings.window)
    return 2 * settings.dim * (pairs + logits) * settings.layers * settings.heads


def bench_scoring(settings: Settings, length: int, keys: str) -> dict[str, Any]:
    """A row of the table of scoring; times in milliseconds, memory in bytes."""
    request = make_request(settings, length, keys)
    table = request.table[0].long()

    def ours() -> Tensor:
        return native.score_tokens(*request.scoring())

    def pytorch() -> Tensor:
        return torch_backend.score_tokens(*request.scoring())

    def rkv() -> list[Tensor]:
        return [
            rkv_style.score(layer, table, length, queries, pool=POOL, mix=MIX, threshold=THRESHOLD)
            for layer, queries in zip(request.layers, request.queries[0], strict=True)
        ]

    works: dict[str, Work] = {"ours": ours, "pytorch": pytorch, "rkv": rkv}
    wanted = pytorch()
    error = float((ours() - wanted).abs().amax() / wanted.abs().amax())
    found = interleaved(works | limits(), settings.repeats, settings.seconds)
    times = medians(found)
    row: dict[str, Any] = {"length": length, "keys": keys, "relative_error": error}
    row |= {f"{name}_ms": times[name] * 1e3 for name in works}
    row |= {f"speedup_over_{name}": times[name] / times["ours"] for name in ("pytorch", "rkv")}
    # The limit is what the machine did at its best in these rounds.
    row["matmul_gflops"] = gflops(min(found["matmul"]))
    if keys == "distinct":
        row["gflops"] = needed_flops(settings, length) / times["ours"] / 1e9
        row["of_matmul"] = row["gflops"] / row["matmul_gflops"]
    row |= {f"{name}_peak_bytes": peak_memory(work) for name, work in works.items()}
    group = settings.query_heads // settings.heads
    scratch = native.score_scratch(length, settings.dim, settings.window, group)
    row["scratch_bytes"] = scratch * min(torch.get_num_threads(), settings.layers * settings.heads)
    row["matrix_bytes"] = 4 * length * length * settings.heads
    row["rounds"] = len(found["ours"])
    return row


def bench_measuring(settings: Settings, length: int) -> dict[str, Any]:
    """A row of the table of sums over the window's queries, and of keys; times in milliseconds."""
    request = make_request(settings, length, "distinct")
    held = (request.table, request.positions, request.num_resident, request.queries)
    counted, newest = (torch.tensor([number], dtype=torch.int32) for number in (settings.window, length - 1))
    keys = (*request.cache, request.table, request.num_resident, length)
    works: dict[str, Work] = {}
    for name, module in (("ours", native), ("pytorch", torch_backend)):
        measure = partial(module.measure_attention, *request.cache, *held, counted, newest)
        works[f"attention_{name}"] = partial(measure, False)
        works[f"error_{name}"] = partial(measure, True)
        works[f"similarity_{name}"] = partial(module.key_similarity, *keys)
    times = medians(interleaved(works, settings.repeats, settings.seconds))
    return {"length": length} | {f"{name}_ms": seconds * 1e3 for name, seconds in times.items()}


def bench_compaction(settings: Settings, length: int) -> dict[str, Any]:
    """A row of the table of compaction; times in milliseconds."""
    request = make_request(settings, length, "similar")
    budget = settings.budget(length)
    table = request.table[0].long()
    scores = native.score_tokens(*request.scoring())
    bounds = (torch.tensor([number], dtype=torch.int32) for number in (budget, 0, length - settings.window))
    num_keep, pin_below, pin_from = bounds
    most = min(budget, length - budget)
    selection = (scores, request.positions, request.num_resident, num_keep, pin_below, pin_from, most)
    moves = native.select_keep(*selection)
    kept = [rkv_style.survivors(each[:, : length - settings.window], budget, settings.window) for each in scores[0]]
    entries = torch.zeros(
        settings.layers, request.cache.caches[0].shape[0], settings.heads, settings.page_size, dtype=torch.int32
    )
    arguments = (*request.cache, entries, request.positions, request.table, request.table, num_keep, *moves)

    def rewrite() -> None:
        for layer, survivors in zip(request.layers, kept, strict=True):
            rkv_style.rewrite(layer, table, length, survivors)

    works = {
        "select": lambda: native.select_keep(*selection),
        "select_pytorch": lambda: torch_backend.select_keep(*selection),
        "ours": lambda: native.compact_pages(*arguments),
        "pytorch": lambda: torch_backend.compact_pages(*arguments),
        "rewrite": rewrite,
    }
    found = interleaved(works | limits(), settings.repeats, settings.seconds)
    times = medians(found)
    rows = settings.layers * settings.heads
    token = 2 * settings.dim * request.cache.caches[0].element_size()
    moved = int(moves[2].sum())
    # Survivors beyond the budget's slots have to move, whatever the method.
    fewest = sum(int((each >= budget).sum()) for each in kept)
    row: dict[str, Any] = {"budget": budget, "buffer": settings.buffer}
    row |= {f"{name}_ms": times[name] * 1e3 for name in works}
    row["speedup_over_rewrite"] = times["rewrite"] / times["ours"]
    row["moved_per_head"], row["most_moved_per_head"] = moved / rows, int(moves[2].max())
    row["bytes"], row["fewest_bytes"], row["rewrite_bytes"] = (2 * token * n for n in (moved, fewest, budget * rows))
    row["gb_per_s"], row["copy_gb_per_s"] = row["bytes"] / times["ours"] / 1e9, gigabytes(min(found["copy"]))
    row["rounds"] = len(found["ours"])
    return row
