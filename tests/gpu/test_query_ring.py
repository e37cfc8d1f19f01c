"""The query ring after many replays of a graph: each query lies where it should, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skipkv_vllm.worker.signals.queries import QueryRing
from tests.devices import DEVICES, capture, no_waiting, synchronize

ROWS, WINDOW, MOST_TOKENS = 24, 8, 16


class Attention:
    """An attention implementation that does nothing."""

    def forward(self, layer: object, query: Tensor) -> Tensor:
        return query


class Expected:
    """What the ring must hold: the newest queries of each row, written one by one."""

    def __init__(self, layers: int, like: Tensor) -> None:
        self.entries = torch.zeros(layers, ROWS, WINDOW, *like.shape[-2:], dtype=like.dtype, device=like.device)
        self.lengths = np.zeros(ROWS, dtype=np.int64)

    def write(self, rows: np.ndarray, positions: np.ndarray, queries: Tensor) -> None:
        """Write one query `[layers, Hq, D]` of each of some rows; `queries` is `[layers, T, Hq, D]`."""
        for place, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            if row >= 0:
                self.entries[:, row, position % WINDOW] = queries[:, place]
                self.lengths[row] = position + 1


@pytest.mark.parametrize("device", DEVICES)
def test_many_replays_with_a_changing_index(device: str, record_property: Callable[[str, Any], None]) -> None:
    """Decode steps of changing requests, some of which are not recorded; queries of padding must get lost."""
    layers, heads, dim, number = (36, 32, 128, 2000) if device == "cuda" else (3, 4, 16, 250)
    dtype, where = torch.bfloat16, torch.device(device)
    ring = QueryRing(
        num_layers=layers,
        num_rows=ROWS,
        window=WINDOW,
        num_kept=WINDOW,
        num_heads=heads,
        head_size=dim,
        max_tokens=MOST_TOKENS,
        dtype=dtype,
        device=where,
    )
    attention = [Attention() for _ in range(layers)]
    for i, each in enumerate(attention):
        ring.attach(i, each)
    queries = torch.zeros(layers, MOST_TOKENS, heads, dim, dtype=dtype, device=where)
    ring.prepare_dummy()
    graph = capture(lambda: [each.forward(None, q) for each, q in zip(attention, queries, strict=True)], where)
    expected, chance = Expected(layers, queries), np.random.default_rng(0)
    generator = torch.Generator(where).manual_seed(0)
    skipped = 0
    with no_waiting(where):
        for _ in range(number):
            queries.normal_(generator=generator)
            rows = chance.permutation(ROWS)[: chance.integers(1, MOST_TOKENS + 1)]
            positions = expected.lengths[rows] + chance.integers(0, 3, len(rows)) * WINDOW
            if chance.random() < 0.1:
                ring.skip()
                skipped += 1
            else:
                rows = np.where(chance.random(len(rows)) < 0.1, -1, rows)
                ring.place(rows, np.ones_like(rows), positions, len(rows))
                expected.write(rows, positions, queries)
            graph.replay()
    synchronize(where)

    assert skipped
    record_property("figures", {"replays": number, "layers": layers, "without_recording": skipped})
    for row, length in enumerate(expected.lengths.tolist()):
        found = ring.newest([row], [length], WINDOW)[0]
        wanted = expected.entries[:, row].roll(-(length % WINDOW), dims=1)
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), f"row {row} holds other queries"
