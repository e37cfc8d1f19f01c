"""Calls of every operator of the Triton backend, for `triton_launches`: shapes and types as a server has them.

What the tensors hold does not matter, because nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipkv_vllm.core.limits import STORED_PAGE
from skipkv_vllm.core.needs import NUM_ACCUMULATED, NUM_ASKING
from skipkv_vllm.ops import STATE, Effect, triton_backend
from skipkv_vllm.ops.paging import Layout, PagedCache

FLOAT, BF16 = torch.float32, torch.bfloat16
CACHES = (FLOAT, torch.float16, BF16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of caches."""
DIMS = (64, 80, 96, 112, 128, 256)
"""Head sizes."""
PAGES = 300
"""Blocks of the server."""
ROWS = 16
"""Requests that can run at once."""
WHOLE = 2**30
"""A part of `vector_norms` that no row exceeds."""


@dataclass(frozen=True)
class Server:
    """What stays as it is while a server runs.

    Attributes:
        cache: dtype of the caches.
        dim: head size.
        layers, heads, group, size, window: L, H, query heads for each kv head, P and W.
        hidden: E.
        layout: how a page is packed; latents have one kv head.
    """

    cache: torch.dtype = BF16
    dim: int = 128
    layers: int = 3
    heads: int = 2
    group: int = 4
    size: int = 16
    window: int = 8
    hidden: int = 1000
    layout: Layout = Layout.ROWS

    def caches(self) -> PagedCache:
        """Pages in which the heads of a token lie together, as those of vLLM's Triton attention."""
        shape = (PAGES, self.size, self.heads, self.dim if self.layout is Layout.LATENT else 2 * self.dim)
        caches = [torch.zeros(shape, dtype=self.cache).transpose(1, 2) for _ in range(self.layers)]
        return PagedCache.of(caches, self.layout)

    @property
    def model(self) -> torch.dtype:
        """Dtype of the model."""
        return BF16 if self.cache.itemsize == 1 else self.cache

    @property
    def queries(self) -> torch.dtype:
        """Dtype of the queries that are compared with keys."""
        return FLOAT if self.cache.itemsize == 1 else self.cache


LATENTS = Server(dim=576, heads=1, group=16, layout=Layout.LATENT)
"""A server of a model with latents (MLA)."""


@dataclass(frozen=True)
class Traffic:
    """What differs from call to call.

    Attributes:
        lengths: tokens of each request.
        width: columns of the tables of pages.
        tokens: tokens of the step.
        moves: of `compact_pages`, at most.
    """

    lengths: Sequence[int] = (300, 201, 77)
    width: int = 19
    tokens: int = 7
    moves: int = 40

    @property
    def requests(self) -> int:
        return len(self.lengths)

    def vector(self, dtype: torch.dtype = torch.int32) -> Tensor:
        """A number for each request."""
        return torch.ones(self.requests, dtype=dtype)

    def table(self) -> Tensor:
        return torch.zeros(self.requests, self.width, dtype=torch.int32)

    def by_slot(self, server: Server, dtype: torch.dtype) -> Tensor:
        """A number for each token: `[R, L, H, N]`."""
        return torch.zeros(self.requests, server.layers, server.heads, max(self.lengths), dtype=dtype)

    def held(self, server: Server) -> tuple[Any, ...]:
        """The first arguments of operators that read keys: caches to num_resident."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return (*server.caches(), self.table(), self.by_slot(server, torch.int32), lengths)

    def queries(self, server: Server, number: int) -> Tensor:
        shape = (self.requests, server.layers, number, server.heads * server.group, server.dim)
        return torch.zeros(shape, dtype=server.queries)


Call = Callable[[Server, Traffic], None]


def score_tokens(server: Server, traffic: Traffic, penalised: bool = True, mix: float = 0.1) -> None:
    penalty = traffic.by_slot(server, FLOAT) if penalised else None
    queries = traffic.queries(server, server.window)
    triton_backend.score_tokens(*traffic.held(server), queries, penalty, 7, mix, 0.5)


def measure_attention(
    server: Server, traffic: Traffic, effect: Effect = Effect.JOINT, with_sinks: bool = False
) -> None:
    queries = traffic.queries(server, NUM_ACCUMULATED)
    sinks = torch.zeros(server.layers, server.heads * server.group) if with_sinks else None
    triton_backend.measure_attention(
        *(*traffic.held(server), queries, traffic.vector(), traffic.vector(), sinks, int(effect), 0.1)
    )


def key_similarity(server: Server, traffic: Traffic) -> None:
    triton_backend.key_similarity(*server.caches(), traffic.table(), traffic.vector(), max(traffic.lengths))


def vector_norms(
    server: Server, traffic: Traffic, values: bool = True, norm: int = 2, part: int = WHOLE, weighted: bool = True
) -> None:
    weights = traffic.by_slot(server, FLOAT) if weighted else None
    triton_backend.vector_norms(*traffic.held(server), values, norm, part, weights)


def central_tokens(server: Server, traffic: Traffic) -> None:
    quota = torch.ones(traffic.requests, 1 + max(traffic.lengths) // 128, dtype=torch.int32)
    triton_backend.central_tokens(*traffic.held(server), traffic.vector(), traffic.vector(), quota, 128)


def pool_neighbours(server: Server, traffic: Traffic) -> None:
    scores, positions = (traffic.by_slot(server, dtype) for dtype in (FLOAT, torch.int32))
    triton_backend.pool_neighbours(scores, positions, traffic.vector(), server.window, 7)


def select_keep(server: Server, traffic: Traffic) -> None:
    scores, positions = (traffic.by_slot(server, dtype) for dtype in (FLOAT, torch.int32))
    triton_backend.select_keep(scores, positions, *(traffic.vector() for _ in range(4)), traffic.moves)


def sidecar(server: Server) -> Tensor:
    return torch.zeros(server.layers, PAGES, server.heads, server.size, dtype=torch.int32)


def compact_pages(server: Server, traffic: Traffic) -> None:
    positions = traffic.by_slot(server, torch.int32)
    moves = [positions.new_zeros(*positions.shape[:3], traffic.moves) for _ in range(2)]
    target = torch.zeros(traffic.requests, traffic.width - 1, dtype=torch.int32)
    triton_backend.compact_pages(
        *(*server.caches(), sidecar(server), positions, traffic.table(), target),
        *(traffic.vector(), *moves, positions.new_zeros(positions.shape[:3])),
    )


def held_positions(server: Server, traffic: Traffic) -> None:
    numbers = (traffic.vector(), traffic.vector())
    triton_backend.held_positions(sidecar(server), traffic.table(), *numbers, max(traffic.lengths))


def track_sentences(
    server: Server, traffic: Traffic, embeds: bool = True, text: int = 0, ids: Any = torch.int32
) -> None:
    hidden = torch.zeros(traffic.tokens, server.hidden, dtype=server.model) if embeds else None
    triton_backend.track_sentences(
        *(torch.zeros(traffic.tokens, dtype=ids), hidden, torch.zeros(4, traffic.requests, dtype=torch.int64)),
        *(traffic.tokens, torch.zeros(500, dtype=torch.bool), True, torch.zeros(ROWS, 401, dtype=torch.int32)),
        *(torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.bool), torch.zeros(ROWS)),
        *(torch.zeros(ROWS, server.hidden), torch.zeros(ROWS, 65, server.hidden, dtype=server.model)),
        torch.zeros(ROWS, text, dtype=torch.int32),
    )


def sentence_similarity(server: Server, traffic: Traffic, rule: int = 0) -> None:
    numbers = [torch.zeros(ROWS, dtype=torch.int64) for _ in range(2)]
    embeddings = torch.zeros(ROWS, 65, server.hidden, dtype=server.model)
    rows = torch.arange(traffic.requests)
    triton_backend.sentence_similarity(embeddings, rows, *numbers, torch.zeros(ROWS, 401), 0.9, rule)


def token_penalties(server: Server, traffic: Traffic) -> None:
    ends, penalties = torch.zeros(ROWS, 401, dtype=torch.int32), torch.zeros(ROWS, 401)
    first, rows = torch.zeros(ROWS, dtype=torch.int64), torch.arange(traffic.requests)
    triton_backend.token_penalties(ends, penalties, first, rows, traffic.by_slot(server, torch.int32))


def record_queries(server: Server, traffic: Traffic, scales: int = 1) -> None:
    heads = server.heads * server.group
    # An attention kernel that reads keys of 8 bits may want such queries too.
    fused = torch.zeros(traffic.tokens, heads + 2 * server.heads, server.dim, dtype=server.cache)
    ring = torch.zeros(ROWS * server.window + 1, heads, server.dim, dtype=server.model)
    scale = torch.ones(scales) if server.cache.itemsize == 1 else None
    triton_backend.record_queries(fused[:, :heads], torch.zeros(64, dtype=torch.int64), ring, scale)


def track_thoughts(server: Server, traffic: Traffic, ids: Any = torch.int32) -> None:
    triton_backend.track_thoughts(
        *(torch.zeros(traffic.tokens, dtype=ids), torch.zeros(4, traffic.requests, dtype=torch.int64)),
        *(torch.zeros(500, dtype=torch.int32), torch.zeros(9, 3, dtype=torch.int32), True, 128, torch.zeros(ROWS, 3)),
        *(torch.zeros(ROWS, len(STATE), dtype=torch.int32), traffic.tokens, torch.zeros(64, dtype=torch.int32)),
        torch.zeros(64),
    )


def steer_add(server: Server, traffic: Traffic) -> None:
    hidden = torch.zeros(traffic.tokens, server.hidden, dtype=server.model)
    numbers = (torch.zeros(64), torch.zeros(64, dtype=torch.int32))
    triton_backend.steer_add(hidden, *numbers, torch.zeros(3, server.hidden))


def key_moments(server: Server, traffic: Traffic) -> None:
    triton_backend.key_moments(*server.caches(), traffic.table(), traffic.vector(), traffic.vector())


def store(server: Server) -> tuple[Tensor, Tensor, Tensor]:
    """Pages for evicted tokens, and the sketches of their keys."""
    shape = (9, server.layers, server.heads, STORED_PAGE)
    signs = torch.zeros(*shape, server.dim // 8, dtype=torch.uint8)
    return torch.zeros(*shape, 2 * server.dim, dtype=server.cache), signs, torch.zeros(shape)


def stored_table(traffic: Traffic) -> Tensor:
    return torch.zeros(traffic.requests, 1 + max(traffic.lengths) // STORED_PAGE, dtype=torch.int32)


def store_tokens(server: Server, traffic: Traffic) -> None:
    moments = [torch.zeros(traffic.requests, server.layers, server.heads, server.dim) for _ in range(2)]
    spans = torch.zeros(traffic.requests, 3, dtype=torch.int32)
    triton_backend.store_tokens(
        *(*server.caches(), traffic.table(), spans, stored_table(traffic), *moments, *store(server))
    )


def recall_tokens(server: Server, traffic: Traffic) -> None:
    places = torch.zeros(traffic.requests, server.layers, server.heads, traffic.moves, dtype=torch.int32)
    triton_backend.recall_tokens(
        *(*server.caches(), sidecar(server), traffic.table(), places, places, traffic.vector()),
        *(stored_table(traffic), store(server)[0]),
    )


def stored_attention(server: Server, traffic: Traffic) -> None:
    queries = traffic.queries(server, NUM_ASKING).float()
    _, *sketches = store(server)
    triton_backend.stored_attention(*sketches, stored_table(traffic), traffic.vector(), queries, max(traffic.lengths))


RECALLING: tuple[Call, ...] = (key_moments, store_tokens, recall_tokens, stored_attention)
"""Operators for tokens that come back; there are none for latents."""
OF_CACHES: tuple[Call, ...] = (
    *(score_tokens, measure_attention, key_similarity, vector_norms, central_tokens, compact_pages, record_queries),
)
"""Operators whose kernels depend on the dtype or on the head size."""
OTHERS: tuple[Call, ...] = (
    *(pool_neighbours, select_keep, held_positions, track_sentences, sentence_similarity, token_penalties),
    *(track_thoughts, steer_add),
)
VARIANTS: tuple[Call, ...] = (
    partial(score_tokens, penalised=False, mix=1.0),
    *(partial(measure_attention, effect=effect) for effect in Effect if effect is not Effect.JOINT),
    partial(measure_attention, with_sinks=True),
    partial(vector_norms, values=False, part=0, weighted=False),
    partial(vector_norms, norm=1, part=64, weighted=False),
    partial(track_sentences, ids=torch.int64, text=90),
    partial(track_sentences, embeds=False),
    partial(sentence_similarity, rule=1),
    partial(track_thoughts, ids=torch.int64),
)
"""Other constants of the same kernels."""
