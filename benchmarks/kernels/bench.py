"""Scoring and compaction of requests in vLLM's pages, by several implementations that take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.core.needs import NUM_ACCUMULATED
from skipkv_vllm.ops import Effect, native, torch_backend
from skipkv_vllm.ops.paging import LayerPages, Layout, PagedCache, layer_pages

from . import rkv_style
from .clocks import CPU, Work
from .machine import OURS, Machine
from .memory import Call, measuring_bytes, scoring_bytes

POOL, MIX, THRESHOLD = 7, 0.1, 0.5
"""The defaults of the policies."""

KEYS = {
    "distinct": "no two keys are similar, so every pair must be looked at",
    "similar": "keys fall into 24 groups of similar ones, so a search for the last similar key ends early",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Sizes of the run: those of an 8B model, on CPUs except for the number of layers.

    Attributes:
        lengths: tokens that a request holds.
        buffer: tokens that a compaction frees.
        layers, heads, query_heads, dim, window: of the model, see `ops.schema`.
        page_size, layout, dtype: of the pages.
        repeats, seconds: rounds at least, and seconds of rounds, for each row.
        requests: numbers of requests in one call.
        others_at: most requests at which other backends than the fastest take part; PyTorch's and the R-KV-style code,
            which take requests one by one, take part at 1 only.
    """

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
    requests: tuple[int, ...] = (1,)
    others_at: int = 1

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.query_heads // self.heads

    @property
    def element_size(self) -> int:
        """Bytes of an element of a key."""
        return int(getattr(torch, self.dtype).itemsize)

    def budget(self, length: int) -> int:
        """Tokens kept of a request that has filled its buffer."""
        return length - self.buffer

    def cells(self, length: int, requests: int) -> int:
        """Tokens of all requests, layers and kv heads."""
        return requests * self.layers * self.heads * length

    def call(self, length: int, requests: int, window: int | None = None) -> Call:
        """Sizes for the formulas of memory."""
        rows = requests * self.layers * self.heads
        return Call(rows, length, self.dim, self.window if window is None else window, self.group)

    def needed_memory(self, length: int, requests: int) -> int:
        """Bytes that a row of results takes at most, about: KV, positions, scores and their order, queries, scratch."""
        kv = 2 * self.dim * self.element_size
        queries = 6 * requests * self.layers * NUM_ACCUMULATED * self.query_heads * self.dim
        return self.cells(length, requests) * (kv + 64) + queries + 2**30


class Request(NamedTuple):
    """R requests of L tokens that must shrink to the budget.

    Attributes:
        cache: the pages.
        layers: the pages of each layer.
        table: int32 `[R, pages]`.
        positions: int32 `[R, layers, H, L]`; tokens lie in order.
        num_resident: int32 `[R]`.
        queries: `[R, layers, W, Hq, D]`.
        length: L.
    """

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

    def each(self, number: int) -> Tensor:
        """The same number for each request, int32 `[R]`."""
        return torch.full_like(self.num_resident, number)


def make_request(
    settings: Settings, length: int, keys: str, requests: int = 1, device: torch.device = CPU, window: int | None = None
) -> Request:
    """Make requests with random keys of a kind of `KEYS`, all tokens in order, pages shuffled."""
    generator = torch.Generator(device).manual_seed(length)
    used = -(-length // settings.page_size)
    dtype, layout = getattr(torch, settings.dtype), Layout[settings.layout.upper()]
    caches = [_empty(settings, requests * used + 1, dtype, layout, device) for _ in range(settings.layers)]
    cache = PagedCache.of(caches, layout)
    table = (torch.randperm(requests * used, generator=generator, device=device) + 1).int().view(requests, used)
    layers = [layer_pages(each, layout) for each in cache.caches]
    for layer, raw in zip(layers, cache.caches, strict=True):
        raw.normal_(generator=generator)
        if keys == "similar":
            _write_similar(layer, table, length, generator)
    shape = (requests, settings.layers, settings.window if window is None else window, settings.query_heads)
    queries = torch.randn(*shape, settings.dim, generator=generator, device=device).to(dtype)
    order = torch.arange(length, dtype=torch.int32, device=device)
    positions = order.expand(requests, settings.layers, settings.heads, -1).contiguous()
    num_resident = torch.full((requests,), length, dtype=torch.int32, device=device)
    return Request(cache, layers, table, positions, num_resident, queries, length)


def _empty(settings: Settings, pages: int, dtype: torch.dtype, layout: Layout, device: torch.device) -> Tensor:
    """Pages of a layer, `[pages, H, P, 2 * D]`; on GPUs the heads of a token lie side by side."""
    double = 2 * settings.dim
    if layout is Layout.ROWS:
        return torch.empty(pages, settings.page_size, settings.heads, double, dtype=dtype, device=device).transpose(
            1, 2
        )
    return torch.empty(pages, settings.heads, settings.page_size, double, dtype=dtype, device=device)


def _write_similar(layer: LayerPages, table: Tensor, length: int, generator: torch.Generator) -> None:
    """Write keys in 24 groups of similar ones, request by request."""
    heads, dim, device = layer.num_heads, layer.raw.shape[3] // 2, table.device
    slot, head = torch.arange(length, device=device), torch.arange(heads, device=device)[:, None]
    for pages in table:
        values = torch.randn(heads, length, dim, generator=generator, device=device)
        centres = torch.randn(heads, 24, dim, generator=generator, device=device)
        group = torch.randint(24, (length,), generator=generator, device=device)
        page, offset = pages[slot // layer.page_size].long(), slot % layer.page_size
        layer.keys.scatter(page, head, offset, (0.6 * values + centres[:, group]).to(layer.raw.dtype))


def needed_flops(settings: Settings, length: int, keys: str = "distinct") -> int:
    """Multiplications and additions without which a request's keys cannot be scored: the logits of the window's
    queries, and for "distinct" keys the cosine of every pair once."""
    pairs = length * (length - 1) // 2 if keys == "distinct" else 0
    logits = settings.window * settings.group * (length - settings.window)
    return 2 * settings.dim * (pairs + logits) * settings.layers * settings.heads


def bench_scoring(machine: Machine, settings: Settings, length: int, keys: str, requests: int = 1) -> Row:
    """Make a row of the table of scoring; times in milliseconds, memory in bytes."""
    request = make_request(settings, length, keys, requests, machine.clock.device)
    works = machine.arms("score_tokens", *request.scoring(), others=requests <= settings.others_at)
    row: Row = {"length": length, "keys": keys, "requests": requests}
    if requests == 1:
        works |= _slow_scoring(request)
        wanted = torch_backend.score_tokens(*request.scoring())
        for name, suffix in _our_names(machine):
            error = (machine.function("score_tokens", name)(*request.scoring()) - wanted).abs().amax()
            row[f"relative_error{suffix}"] = float(error / wanted.abs().amax())
    timed = machine.time(works, settings.repeats, settings.seconds)
    seconds, reached = timed.seconds, timed.reached
    row |= timed.ms()
    row |= {f"speedup_over_{name}": seconds[name] / seconds[OURS] for name in ("pytorch", "rkv") if name in seconds}
    row |= reached.as_row()
    flops = requests * needed_flops(settings, length, keys)
    if keys == "distinct":
        row["gflops"] = flops / seconds[OURS] / 1e9
        row["of_matmul"] = row["gflops"] / row["matmul_gflops"]
    # Keys and positions are read, scores written.
    cells = settings.cells(length, requests)
    floor = reached.floor(flops, cells * (settings.dim * settings.element_size + 8))
    row |= _against_floor(floor, seconds[OURS]) | _host(machine, works[OURS])
    row |= {f"{name}_peak_bytes": machine.clock.peak_memory(work) for name, work in works.items()}
    row |= _scoring_memory(machine, settings, length, requests)
    row["rounds"] = timed.rounds
    return row


def _our_names(machine: Machine) -> list[tuple[str, str]]:
    """Name every backend, and what is appended to the names of its figures."""
    return [(name, "" if i == 0 else f"_{name}") for i, name in enumerate(machine.backends)]


def _slow_scoring(request: Request) -> dict[str, Work]:
    """Return the implementations that take requests one by one."""
    table = request.table[0].long()

    def rkv() -> list[Tensor]:
        return [
            rkv_style.score(layer, table, request.length, queries, pool=POOL, mix=MIX, threshold=THRESHOLD)
            for layer, queries in zip(request.layers, request.queries[0], strict=True)
        ]

    return {"pytorch": lambda: torch_backend.score_tokens(*request.scoring()), "rkv": rkv}


def _against_floor(floor: float, seconds: float) -> Row:
    """The time that the machine's rates allow, and what share of the measured one it is."""
    return {"floor_ms": floor * 1e3, "of_floor": floor / seconds}


def _host(machine: Machine, work: Work) -> Row:
    """Microseconds in which the host enqueues a call, where it does not run it itself."""
    seconds = machine.clock.enqueue(work)
    return {} if seconds is None else {"host_us": seconds * 1e6}


def _scoring_memory(machine: Machine, settings: Settings, length: int, requests: int) -> Row:
    """What the formulas say about the memory of a call, and the size of R-KV's matrix."""
    row: Row = {"matrix_bytes": 4 * length * length * settings.heads}
    if machine.clock.kind == "cpu":
        scratch = native.score_scratch(length, settings.dim, settings.window, settings.group)
        return row | {"scratch_bytes": scratch * min(torch.get_num_threads(), settings.layers * settings.heads)}
    call = settings.call(length, requests)
    return row | {f"formula_bytes{suffix}": scoring_bytes(name, call) for name, suffix in _our_names(machine)}


def bench_measuring(machine: Machine, settings: Settings, length: int, requests: int = 1) -> Row:
    """Make a row of the table of sums over queries, as many as are accumulated at once, and of keys; times in
    milliseconds."""
    number = NUM_ACCUMULATED
    request = make_request(settings, length, "distinct", requests, machine.clock.device, number)
    held = (request.table, request.positions, request.num_resident, request.queries)
    counted = (request.each(number), request.each(length - 1))
    calls: dict[str, tuple[Any, ...]] = {
        name: ("measure_attention", *request.cache, *held, *counted, None, effect, 0.0)
        for name, effect in (("attention", Effect.ATTENTION), ("error", Effect.OUTPUT))
    }
    calls["similarity"] = ("key_similarity", *request.cache, request.table, request.num_resident, length)
    works: dict[str, Work] = {}
    for name, (operator, *arguments) in calls.items():
        arms = machine.arms(operator, *arguments, others=requests <= settings.others_at)
        if requests == 1:
            arms["pytorch"] = _pytorch(operator, arguments)
        works |= {f"{name}_{arm}": work for arm, work in arms.items()}
    timed = machine.time(works, settings.repeats, settings.seconds)
    row: Row = {"length": length, "requests": requests, "queries": number} | timed.ms() | timed.reached.as_row()
    cells, of_vector = settings.cells(length, requests), settings.dim * settings.element_size
    product = 2 * settings.dim * number * settings.group * cells
    floors = {"attention": (product, 1), "error": (2 * product, 2), "similarity": (2 * settings.dim * cells, 1)}
    for name, (flops, vectors) in floors.items():
        floor = timed.reached.floor(flops, cells * (vectors * of_vector + 8))
        row |= {f"{name}_{key}": value for key, value in _against_floor(floor, timed.seconds[f"{name}_ours"]).items()}
        row |= {f"{name}_{key}": value for key, value in _host(machine, works[f"{name}_ours"]).items()}
    row["error_peak_bytes"] = machine.clock.peak_memory(works["error_ours"])
    if machine.clock.kind != "cpu":
        row["error_formula_bytes"] = measuring_bytes(settings.call(length, requests, number), True)
    return row


def _pytorch(operator: str, arguments: Any) -> Work:
    return lambda: getattr(torch_backend, operator)(*arguments)


def bench_compaction(machine: Machine, settings: Settings, length: int, requests: int = 1) -> Row:
    """Make a row of the table of compaction; times in milliseconds."""
    request = make_request(settings, length, "similar", requests, machine.clock.device)
    budget, device = settings.budget(length), machine.clock.device
    bounds = (request.each(budget), request.each(0), request.each(length - settings.window))
    scores = machine.function("score_tokens")(*request.scoring())
    selection = (scores, request.positions, request.num_resident, *bounds, min(budget, length - budget))
    moves = machine.function("select_keep")(*selection)
    caches = request.cache.caches
    sidecar = torch.zeros(len(caches), *caches[0].shape[:3], dtype=torch.int32, device=device)
    tables = (request.table, request.table)
    arguments = (*request.cache, sidecar, request.positions, *tables, request.each(budget), *moves)
    others = requests <= settings.others_at
    works = machine.arms("compact_pages", *arguments, others=others)
    held = (sidecar, request.table, request.each(budget), request.each(0), length)
    for name, operator, call in (("select", "select_keep", selection), ("positions", "held_positions", held)):
        arms = machine.arms(operator, *call, others=others)
        works |= {name if arm == OURS else f"{name}_{arm}": work for arm, work in arms.items()}
    if requests == 1:
        works |= _slow_compaction(settings, request, selection, arguments, scores)
    timed = machine.time(works, settings.repeats, settings.seconds)
    row: Row = {"budget": budget, "buffer": settings.buffer, "length": length, "requests": requests} | timed.ms()
    if "rewrite" in timed.seconds:
        row["speedup_over_rewrite"] = timed.seconds["rewrite"] / timed.seconds[OURS]
    row |= _moved(settings, request, scores, moves[2], timed.seconds[OURS])
    row |= timed.reached.as_row()
    floor = timed.reached.floor(0, row["fewest_bytes"])
    row |= _against_floor(floor, timed.seconds[OURS]) | _host(machine, works[OURS])
    row["rounds"] = timed.rounds
    return row


def _slow_compaction(
    settings: Settings, request: Request, selection: tuple[Any, ...], arguments: tuple[Any, ...], scores: Tensor
) -> dict[str, Work]:
    """Return the implementations that take requests one by one."""
    table, length, window = request.table[0].long(), request.length, settings.window
    old = scores[0, ..., : length - window]
    kept = [rkv_style.survivors(each, settings.budget(length), window) for each in old]

    def rewrite() -> None:
        for layer, survivors in zip(request.layers, kept, strict=True):
            rkv_style.rewrite(layer, table, length, survivors)

    return {
        "select_pytorch": lambda: torch_backend.select_keep(*selection),
        "pytorch": lambda: torch_backend.compact_pages(*arguments),
        "rewrite": rewrite,
    }


def _moved(settings: Settings, request: Request, scores: Tensor, count: Tensor, seconds: float) -> Row:
    """Count the tokens that move, and their bytes, read and written."""
    rows, length, window, budget = count.numel(), request.length, settings.window, settings.budget(request.length)
    token = 2 * settings.dim * settings.element_size
    # Survivors beyond the budget's slots have to move, whatever the method.
    kept = scores[..., : length - window].topk(budget - window, dim=-1).indices
    fewest = int((kept >= budget).sum()) + rows * min(window, length - budget)
    row: Row = {"moved_per_head": int(count.sum()) / rows, "most_moved_per_head": int(count.max())}
    row["bytes"], row["fewest_bytes"], row["rewrite_bytes"] = (
        2 * token * number for number in (int(count.sum()), fewest, budget * rows)
    )
    return row | {"gb_per_s": row["bytes"] / seconds / 1e9}
