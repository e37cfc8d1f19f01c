"""The observation-query ring: the last W queries of every request, whatever the chunks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skipkv_vllm.worker.signals.queries import QueryRing

LAYERS, HEADS, DIM = 2, 3, 4


class FakeImpl:
    """Stands in for vLLM's attention implementation."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def forward(self, layer, query, key, value, *, scale=1.0):
        self.seen.append(query)
        return query * scale + key + value


def make_ring(num_kept: int = 4, slots: int = 3, max_tokens: int = 64) -> tuple[QueryRing, list[FakeImpl]]:
    ring = QueryRing(
        num_layers=LAYERS,
        num_rows=slots,
        window=num_kept,
        num_kept=num_kept,
        num_heads=HEADS,
        head_size=DIM,
        max_tokens=max_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    impls = [FakeImpl() for _ in range(LAYERS)]
    for i, impl in enumerate(impls):
        ring.attach(i, impl)
    return ring, impls


def query_of(layer: int, request: int, position: int) -> Tensor:
    """Return a query that identifies its token."""
    head = torch.arange(HEADS)[:, None] * 0.25
    return 10000.0 * layer + 1000.0 * request + position + head + torch.arange(DIM) * 0.01


def step(ring: QueryRing, impls: list[FakeImpl], parts: list[tuple[int, int, int, int]], padding: int = 0) -> None:
    """One forward pass over (slot, request, start, count) parts."""
    slots, _, starts, counts = (np.array(column, dtype=np.int64) for column in zip(*parts, strict=True))
    ring.place(slots, counts, starts, int(counts.sum()))
    for layer, impl in enumerate(impls):
        rows = [query_of(layer, request, p) for _, request, start, count in parts for p in range(start, start + count)]
        query = torch.stack([*rows, *(torch.full((HEADS, DIM), -1.0) for _ in range(padding))])
        impl.forward(None, query, query, query)


def expect(ring: QueryRing, slot: int, request: int, num_logical: int) -> None:
    for layer in range(LAYERS):
        wanted = torch.stack([query_of(layer, request, p) for p in range(num_logical - ring.num_kept, num_logical)])
        assert torch.equal(ring.of_layer(layer, slot, num_logical, ring.num_kept), wanted)


@pytest.mark.parametrize("count", [4, 5, 7, 8, 30])
def test_a_chunk_of_at_least_a_window(count):
    ring, impls = make_ring()
    step(ring, impls, [(1, 7, 0, count)])
    expect(ring, 1, 7, count)


def test_decode_steps_one_token_at_a_time():
    ring, impls = make_ring()
    step(ring, impls, [(0, 5, 0, 6)])
    for position in range(6, 23):
        step(ring, impls, [(0, 5, position, 1)])
        expect(ring, 0, 5, position + 1)


def test_chunks_shorter_than_the_window_add_up():
    ring, impls = make_ring()
    step(ring, impls, [(2, 1, 0, 3)])
    step(ring, impls, [(2, 1, 3, 2)])
    step(ring, impls, [(2, 1, 5, 3)])
    expect(ring, 2, 1, 8)


def test_starts_that_are_no_multiple_of_the_window():
    # After a prefix-cache hit the first computed token has any position.
    ring, impls = make_ring()
    step(ring, impls, [(0, 3, 33, 5)])
    expect(ring, 0, 3, 38)


def test_several_requests_and_an_unmanaged_one():
    ring, impls = make_ring()
    step(ring, impls, [(2, 1, 0, 9), (-1, 2, 0, 11), (0, 3, 100, 5)], padding=6)
    expect(ring, 2, 1, 9)
    expect(ring, 0, 3, 105)
    assert not ring.of_layer(0, 1, 4, ring.num_kept).any(), "queries of unmanaged requests must not be recorded"


def test_padding_is_recorded_nowhere():
    ring, impls = make_ring(max_tokens=16)
    step(ring, impls, [(0, 1, 0, 8)])
    step(ring, impls, [(0, 1, 8, 1)], padding=15)
    expect(ring, 0, 1, 9)
    for slot in (1, 2):
        assert not ring.of_layer(0, slot, 4, ring.num_kept).any()


def test_a_shorter_step_forgets_the_index_of_the_longer_one_before():
    ring, impls = make_ring(max_tokens=16)
    step(ring, impls, [(0, 1, 0, 6), (1, 2, 0, 6)])
    # Without the reset, rows 1.. of this step would still point into the slots of the last one.
    step(ring, impls, [(0, 1, 6, 1)], padding=12)
    expect(ring, 0, 1, 7)
    expect(ring, 1, 2, 6)


def test_a_dummy_pass_records_nothing():
    ring, impls = make_ring()
    step(ring, impls, [(0, 1, 0, 8)])
    ring.prepare_dummy()
    garbage = torch.full((20, HEADS, DIM), -7.0)
    for impl in impls:
        impl.forward(None, garbage, garbage, garbage)
    expect(ring, 0, 1, 8)
    for slot in (1, 2):
        assert not ring.of_layer(1, slot, 4, ring.num_kept).any()


def test_a_step_without_requests():
    ring, _ = make_ring()
    nothing = np.zeros(0, dtype=np.int64)
    ring.place(nothing, nothing, nothing, 0)


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(window, seed):
    chance = random.Random(seed)
    ring, impls = make_ring(window, slots=5)
    positions = {(slot, slot * 10): chance.randint(0, 20) for slot in range(5)}
    computed = dict.fromkeys(positions, 0)
    for _ in range(30):
        chosen = chance.sample(sorted(positions), chance.randint(1, 5))
        parts = [(slot, request, positions[slot, request], chance.choice([1, 1, 2, 9])) for slot, request in chosen]
        parts.insert(chance.randint(0, len(parts)), (-1, 99, 3, chance.randint(1, 9)))
        step(ring, impls, parts, padding=chance.choice([0, 3]))
        for slot, request, _, count in parts:
            if slot >= 0:
                positions[slot, request] += count
                computed[slot, request] += count
        for (slot, request), n in computed.items():
            if n >= window:
                expect(ring, slot, request, positions[slot, request])


# ---- attaching


def test_attach_leaves_the_result_and_the_arguments_alone():
    ring, impls = make_ring()
    ring.place(np.array([0]), np.array([2]), np.array([0]), 2)
    query, key, value = (torch.randn(2, HEADS, DIM) for _ in range(3))
    result = impls[0].forward(None, query, key, value, scale=2.0)
    assert torch.equal(result, query * 2.0 + key + value)
    assert impls[0].seen[0] is query


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3, 0.5, 2.0])], ids=["one", "by head"])
def test_queries_that_vllm_quantised_are_recorded_as_they_were(scale):
    class Kernel(FakeImpl):
        def forward(self, layer, query):
            self.seen.append(query)

    ring, _ = make_ring()
    impl: Any = Kernel()
    ring.attach(1, impl)
    ring.place(np.array([1]), np.array([2]), np.array([4]), 2)
    queries = torch.randn(2, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    stored = (queries / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
    impl.forward(SimpleNamespace(_q_scale=scale), stored)
    torch.testing.assert_close(ring.of_layer(1, 1, 6, ring.num_kept)[-2:], queries, rtol=2**-4, atol=2**-8)
    assert impl.seen[0] is stored, "attention must get its unchanged input"


def test_attached_objects_stay_instances_of_their_class():
    _, impls = make_ring()
    assert all(isinstance(impl, FakeImpl) for impl in impls)
    assert type(impls[0]) is type(impls[1]), "there must be one subclass per implementation"
    assert type(FakeImpl()) is FakeImpl, "other objects must not change"


def test_attach_works_for_different_classes_at_once():
    class Doubling(FakeImpl):
        def forward(self, layer, query, key, value):
            return super().forward(layer, query, key, value) * 2

    ring, _ = make_ring()
    impl = Doubling()
    ring.attach(1, impl)
    ring.place(np.array([2]), np.array([4]), np.array([0]), 4)
    query = torch.randn(4, HEADS, DIM)
    assert torch.equal(impl.forward(None, query, query, query), query * 6)
    assert torch.equal(ring.of_layer(1, 2, 4, ring.num_kept), query)
    assert not ring.of_layer(0, 2, 4, ring.num_kept).any(), "layer 0 took part in no pass"


def test_ring_memory():
    ring, _ = make_ring(num_kept=8, slots=3, max_tokens=16)
    assert ring.nbytes == LAYERS * (3 * 8 + 1) * HEADS * DIM * 4 + 16 * 8


def test_queries_can_be_handed_out_instead():
    ring, impls = make_ring()
    step(ring, impls, [(0, 0, 0, 4)])
    ring.skip()
    held = [ring.of_layer(layer, 0, 4, ring.num_kept) for layer in range(LAYERS)]
    with ring.handing_out() as seen:
        for layer, impl in enumerate(impls):
            query = torch.full((2, HEADS, DIM), float(layer))
            impl.forward(None, query, query, query)
            query += 5  # vLLM reuses its buffers
    assert [each.unique().tolist() for each in seen] == [[0.0], [1.0]]
    assert not ring.recording
    step(ring, impls, [(1, 1, 0, 4)])
    assert all(torch.equal(ring.of_layer(layer, 0, 4, ring.num_kept), held[layer]) for layer in range(LAYERS))
    assert len(seen) == LAYERS


# ---- drafts


@pytest.mark.parametrize("window", [4, 7])
def test_wrong_drafts_leave_nothing_behind_at_a_bound(window):
    """No draft is computed beyond the bound, so the right token overwrites what a wrong one left."""
    ring, impls = make_ring(num_kept=window, max_tokens=64)
    chance, position, rows = random.Random(window), [0, 3], np.array([0, 2])
    for bound in ([window, window + 5], [30, 31], [62, 53]):
        while position != bound:
            left = [b - p for b, p in zip(bound, position, strict=True)]
            counts = [min(chance.randint(1, 4), n) if n else 1 for n in left]
            accepted = [chance.randint(1, count) if n else 0 for count, n in zip(counts, left, strict=True)]
            # A request that has reached its bound waits: it computes for nobody here.
            active = np.where(np.array(left) > 0, rows, -1)
            parts = list(zip(rows.tolist(), position, counts, accepted, strict=True))
            ring.place_at(active, np.array(counts), torch.tensor([p + i for _, p, n, _ in parts for i in range(n)]))
            for layer, impl in enumerate(impls):
                wrong = torch.full((HEADS, DIM), -7.0)
                queries = [query_of(layer, r, p + i) if i < a else wrong for r, p, n, a in parts for i in range(n)]
                impl.forward(None, *3 * [torch.stack(queries)])
            position = [p + a for p, a in zip(position, accepted, strict=True)]
        for row, end in zip(rows.tolist(), bound, strict=True):
            expect(ring, row, row, end)


def test_positions_on_the_device_give_the_same_entries():
    ring, _ = make_ring(num_kept=4, max_tokens=32)
    rows, counts, starts = np.array([1, -1, 0]), np.array([9, 2, 1]), np.array([6, 0, 11])
    ring.place(rows, counts, starts, 12)
    expected = ring.index.clone()
    ring.place_at(rows, counts, torch.tensor([*range(6, 15), 0, 1, 11]))
    assert torch.equal(ring.index, expected)
    ring.place_at(rows[:1], np.array([1]), torch.tensor([15]))
    assert (ring.index[1:] == ring.index[-1]).all(), "entries of the last step are left"
