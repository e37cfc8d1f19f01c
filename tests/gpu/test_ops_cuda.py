"""The operators on a GPU: sizes, streams, graphs and synchronisation.

`tests/unit/ops/test_parity*.py` have the small cases. Unavailable backends are skipped with the reason.
`SKIPKV_GPU_TESTS=cpu` runs the same on a CPU, to test these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.ops import Effect, torch_backend
from skipkv_vllm.ops.paging import Layout, PagedCache
from tests.devices import ON_CPU, capture, no_waiting
from tests.operators.thought_cases import check_thoughts
from tests.operators.tracking_cases import check_tracking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
    ),
]

DEVICE = torch.device("cpu" if ON_CPU else "cuda")
HALF_TYPES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32], ids=str)


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module = import_module(f"skipkv_vllm.ops.{'native' if request.param == 'native' else 'triton_backend'}")
    if why := module.unavailable(DEVICE.type):
        pytest.skip(f"{request.param}: {why}")
    return module


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def scoring(
    lengths: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: int = 2,
    heads: int = 4,
    group: int = 4,
    dim: int = 128,
    window: int = 8,
    size: int = 16,
    first_page: int = 1,
) -> list[Any]:
    """Arguments of `score_tokens` on the GPU: noisy keys around a few centres, in the first pages from page 1 on."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    requests, n = len(lengths), max(lengths)
    used = -(-n // size)
    pages = first_page + requests * used
    caches = []
    for _ in range(layers):
        cache = torch.empty(pages, size, heads, 2 * dim, dtype=dtype, device=DEVICE).transpose(1, 2)
        held = cache[first_page:]
        held.copy_(torch.randn(held.shape, device=DEVICE, generator=generator))
        centres = torch.randn(6, dim, device=DEVICE, generator=generator)
        nearest = torch.randint(6, held.shape[:3], device=DEVICE, generator=generator)
        held[..., :dim] += centres[nearest].to(dtype)
        caches.append(cache)
    ids = first_page + torch.randperm(requests * used, device=DEVICE, generator=generator)
    rows = requests * layers * heads
    positions = torch.rand(rows, 2 * n, device=DEVICE, generator=generator).argsort(-1)[:, :n]
    queries = torch.randn(requests, layers, window, heads * group, dim, device=DEVICE, generator=generator)
    return [
        *PagedCache.of(caches, Layout.ROWS),
        ids.view(requests, used).int(),
        positions.view(requests, layers, heads, n).int(),
        numbers(*lengths),
        queries.to(dtype),
        torch.rand(requests, layers, heads, n, device=DEVICE, generator=generator) * 1e-4,
        7,
        0.1,
        0.55,
    ]


def assert_scores(got: Tensor, wanted: Tensor, lengths: tuple[int, ...], tolerance: float) -> None:
    """Check errors relative to a row's largest score, because a score may be a difference of nearly equal parts."""
    for r, length in enumerate(lengths):
        error = (got - wanted)[r, ..., :length].abs().amax(-1) / wanted[r, ..., :length].abs().amax(-1)
        assert error.max() <= tolerance, f"request {r}: {error}"
        assert (got[r, ..., length:] == -torch.inf).all()


def compaction(arguments: list[Any], keep: int) -> list[Any]:
    """Arguments of `compact_pages` after `score_tokens`; every third target page is fresh, and caches are copies."""
    caches, _, _, table, positions, num_resident, *_ = arguments
    pages, heads, size, _ = caches[0].shape
    requests = table.shape[0]
    keeps = torch.full_like(num_resident, keep)
    most = int((num_resident - keeps).clamp(max=keep).max())
    scores = torch_backend.score_tokens(*arguments)
    pins = (torch.full_like(keeps, 4), torch.full_like(keeps, 2**30))
    moves = torch_backend.select_keep(scores, positions, num_resident, keeps, *pins, most)
    spare = torch.arange(requests * table.shape[1], device=DEVICE, dtype=torch.int32).view_as(table) + pages
    target = torch.where(torch.arange(table.shape[1], device=DEVICE) % 3 == 0, spare, table)
    grown = []
    for cache in caches:
        other = torch.zeros(pages + spare.numel(), size, heads, cache.shape[3], dtype=cache.dtype, device=DEVICE)
        other[:pages] = cache.transpose(1, 2)
        grown.append(other.transpose(1, 2))
    sidecar = torch.zeros(len(caches), pages + spare.numel(), heads, size, dtype=torch.int32, device=DEVICE)
    return [*PagedCache.of(grown, arguments[2]), sidecar, positions, table, target, keeps, *moves]


@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_scores_of_long_requests(backend, dtype, dim):
    lengths = (2500, 1111, 64)
    arguments = scoring(lengths, dtype, dim=dim)
    got = backend.score_tokens(*arguments)
    assert_scores(got, torch_backend.score_tokens(*arguments), lengths, 2e-2)


def measuring(arguments: list[Any], *counted: int) -> list[Any]:
    """Arguments of `measure_attention` without the last one, from those of `score_tokens`."""
    positions, queries = arguments[4], arguments[6]
    newest = positions.amax(dim=(1, 2, 3)).int()
    return [*arguments[:6], queries, numbers(*counted), newest, None]


@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_attention_and_keys_of_long_requests(backend, dtype, dim):
    lengths = (2500, 1111, 64)
    arguments = measuring(scoring(lengths, dtype, dim=dim, window=32), 32, 17, 0)
    for effect in set(Effect) - {Effect.NEGLIGIBLE}:
        got = backend.measure_attention(*arguments, effect, 0.0)
        wanted = torch_backend.measure_attention(*arguments, effect, 0.0)
        assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max()
        assert torch.equal(got, backend.measure_attention(*arguments, effect, 0.0))
    keys = (*arguments[:4], arguments[5], 2500)
    torch.testing.assert_close(backend.key_similarity(*keys), torch_backend.key_similarity(*keys), rtol=0, atol=1e-3)


def test_scores_of_more_rows_than_scratch_memory_takes_at_once(backend, monkeypatch):
    lengths = (1200, 1100, 900)
    # 80 KB of scratch memory per row; the CUDA kernels take at most 256 MiB at once.
    arguments = scoring(lengths, layers=80, heads=16, group=1)
    monkeypatch.setattr("skipkv_vllm.ops.triton_backend.scoring.SCRATCH_BYTES", 32 << 20)
    got = backend.score_tokens(*arguments)
    assert_scores(got, torch_backend.score_tokens(*arguments), lengths, 2e-2)


def test_the_same_bits_every_time(backend):
    arguments = scoring((3000, 1500))
    first = backend.score_tokens(*arguments)
    assert all(torch.equal(first, backend.score_tokens(*arguments)) for _ in range(5))


@pytest.mark.parametrize("keep", [1, 1024, 2499, 2500])
def test_selection_and_compaction_of_long_requests(backend, keep):
    arguments = scoring((2500, 2500))
    positions, num_resident = arguments[4:6]
    scores = torch_backend.score_tokens(*arguments)
    pins = (torch.full_like(num_resident, 0), torch.full_like(num_resident, 2**30))
    options = (scores, positions, num_resident, torch.full_like(num_resident, keep), *pins, min(keep, 2500 - keep))
    for got, wanted in zip(backend.select_keep(*options), torch_backend.select_keep(*options), strict=True):
        assert torch.equal(got, wanted)

    got, wanted = compaction(arguments, max(keep, 8)), compaction(arguments, max(keep, 8))
    backend.compact_pages(*got)
    torch_backend.compact_pages(*wanted)
    bits = torch.int16
    assert all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip(got[0], wanted[0], strict=True))
    assert torch.equal(got[3], wanted[3])


def latents(lengths: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, window: int = 8) -> list[Any]:
    """Arguments of `score_tokens` for latents of 576 features and 20 query heads."""
    caches, pointers, _, *others = scoring(lengths, dtype, heads=1, dim=288, group=1, window=window)
    queries = torch.randn(len(lengths), len(caches), window, 20, 576, device=DEVICE).to(dtype)
    return [caches, pointers, Layout.LATENT, *others[:3], queries, *others[4:7], 0.2]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_latents_are_scored_and_measured(dtype):
    triton = import_module("skipkv_vllm.ops.triton_backend")
    if why := triton.unavailable(DEVICE.type):
        pytest.skip(f"triton: {why}")
    lengths = (900, 333, 64)
    arguments = latents(lengths, dtype)
    assert_scores(triton.score_tokens(*arguments), torch_backend.score_tokens(*arguments), lengths, 2e-2)
    arguments = measuring(latents(lengths, dtype, window=32), 32, 17, 0)
    for effect in set(Effect) - {Effect.NEGLIGIBLE}:
        got, wanted = (each.measure_attention(*arguments, effect, 0.0) for each in (triton, torch_backend))
        assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    keys = (*arguments[:4], arguments[5], 900)
    torch.testing.assert_close(triton.key_similarity(*keys), torch_backend.key_similarity(*keys), rtol=0, atol=1e-3)
    for values in (False, True):
        got, wanted = (each.vector_norms(*arguments[:6], values, 2, 128, None) for each in (triton, torch_backend))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("keep", [1, 600])
def test_latents_are_moved(backend, keep):
    arguments = latents((900, 900))
    got, wanted = compaction(arguments, max(keep, 8)), compaction(arguments, max(keep, 8))
    backend.compact_pages(*got)
    torch_backend.compact_pages(*wanted)
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(got[0], wanted[0], strict=True))
    assert torch.equal(got[3], wanted[3])


def free_memory() -> int:
    """Return the free bytes of the device; of a CPU none are to be used."""
    return 0 if ON_CPU else torch.cuda.mem_get_info()[0]


def test_pages_beyond_what_32_bits_address(backend):
    """The element offset of a cell does not fit into 32 bits."""
    per_page = 16 * 2 * 2 * 128
    first = 2**31 // per_page + 5
    free = free_memory()
    if free < 4 * first * per_page * 2:
        pytest.skip(f"needs {4 * first * per_page * 2 >> 30} GiB of free GPU memory, there are {free >> 30}")
    arguments = scoring((100,), heads=2, layers=1, group=2, first_page=first)
    assert_scores(backend.score_tokens(*arguments), torch_backend.score_tokens(*arguments), (100,), 2e-2)
    got = compaction(arguments, 40)
    before = [cache[first:].clone() for cache in got[0]]
    backend.compact_pages(*got)
    moved = [cache[first:].clone() for cache in got[0]]
    sidecar = got[3].clone()
    for cache, old in zip(got[0], before, strict=True):
        cache[first:] = old
    torch_backend.compact_pages(*got)
    assert all(torch.equal(a, b[first:]) for a, b in zip(moved, got[0], strict=True))
    assert torch.equal(sidecar, got[3])


@pytest.mark.parametrize("seed", range(30))
def test_tracking(backend, seed):
    check_tracking(backend, seed, DEVICE.type)


@pytest.mark.parametrize("seed", range(30))
def test_thoughts(backend, seed):
    check_thoughts(backend, seed, DEVICE.type)


def every_operator(module: ModuleType) -> list[Callable[[], Any]]:
    """Return calls of all operators with arguments on the GPU."""
    arguments = scoring((300, 200))
    positions, num_resident = arguments[4:6]
    keeps = numbers(150, 150)
    scores = torch_backend.score_tokens(*arguments)
    selection = (scores, positions, num_resident, keeps, numbers(4, 4), numbers(2**30, 2**30), 150)
    moves = compaction(arguments, 150)
    generator = torch.Generator(DEVICE).manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(3, 17, 256, device=DEVICE, generator=generator), dim=-1)
    slots = torch.tensor([2, 0], device=DEVICE)
    count, compared = (torch.full((3,), n, device=DEVICE) for n in (16, 5))
    penalties = torch.zeros(3, 40, device=DEVICE)
    tracker = (count.clone(), torch.zeros(3, dtype=torch.bool, device=DEVICE), torch.zeros(3, device=DEVICE))
    spans = torch.tensor([[2, 0], [0, 3], [3, 2], [50, 60]], device=DEVICE)
    ids, is_delimiter = torch.arange(5, device=DEVICE), torch.tensor([0, 0, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    states, ends = torch.randn(5, 256, device=DEVICE), torch.full((3, 40), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    open_sum, text = torch.zeros(3, 256, device=DEVICE), torch.zeros(3, 80, dtype=torch.int32, device=DEVICE)
    query, rows = torch.randn(5, 8, 128, device=DEVICE), torch.zeros(9, 8, 128, device=DEVICE)
    index = torch.tensor([3, 1, 8, 0, 2], device=DEVICE)
    thoughts = (spans, torch.arange(20, dtype=torch.int32, device=DEVICE) % 16, torch.zeros_like(numbers(0))[None])
    strengths, thinking = torch.ones(3, 3, device=DEVICE), torch.ones(3, 10, dtype=torch.int32, device=DEVICE)
    thinking[:, 3] = 0
    steered = (numbers(0, 0, 0, 0, 0), torch.zeros(5, device=DEVICE))
    steering = (torch.randn(5, 512, device=DEVICE), torch.ones(5, device=DEVICE), numbers(0, 1, 2, 0, 1))
    vectors = torch.randn(3, 512, device=DEVICE)
    sidecar = torch.zeros(2, 4, 2, 16, dtype=torch.int32, device=DEVICE)
    held = (sidecar, numbers(3, 0, 1)[None], numbers(20), numbers(7))
    measured, quota = measuring(arguments, 8, 5), torch.full((2, 8), 16, dtype=torch.int32, device=DEVICE)
    return [
        lambda: module.score_tokens(*arguments),
        *(partial(module.measure_attention, *measured, effect, 0.3) for effect in Effect),
        lambda: module.key_similarity(*arguments[:4], num_resident, 300),
        lambda: module.vector_norms(*arguments[:6], True, 2, 300, arguments[7]),
        lambda: module.vector_norms(*arguments[:6], False, 2, 100, None),
        lambda: module.pool_neighbours(arguments[7], positions, num_resident, 8, 7),
        lambda: module.central_tokens(*arguments[:6], num_resident * 0, num_resident + 200, quota, 64),
        lambda: module.select_keep(*selection),
        lambda: module.compact_pages(*moves),
        lambda: module.track_sentences(ids, states, spans, 5, is_delimiter, True, ends, *tracker, open_sum, unit, text),
        lambda: module.sentence_similarity(unit, slots, count, compared, penalties, 0.1, 0),
        lambda: module.held_positions(*held, 40),
        lambda: module.token_penalties(ends, penalties, count, slots, positions),
        lambda: module.record_queries(query, index, rows, None),
        lambda: module.track_thoughts(ids, *thoughts, True, 128, strengths, thinking, 5, *steered),
        lambda: module.steer_add(*steering, vectors),
    ]


def test_no_operator_waits_for_the_gpu(backend):
    calls = every_operator(backend)
    for call in calls:
        call()  # compiles
    with no_waiting(DEVICE):
        for call in calls:
            call()


@pytest.mark.skipif(ON_CPU, reason="a CPU has no streams")
def test_operators_run_on_the_current_stream(backend):
    """Make inputs on a side stream behind a long wait; any other stream would read them too early."""
    arguments = scoring((300, 200))
    wanted = backend.score_tokens(*arguments)
    penalty = arguments[7].clone()
    rows = torch.zeros(5, 2, 64, device=DEVICE)
    query, index = torch.zeros(4, 2, 64, device=DEVICE), torch.arange(4, device=DEVICE)
    backend.record_queries(query, index, rows, None)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        arguments[7].fill_(torch.nan)
        torch.cuda._sleep(100_000_000)
        arguments[7].copy_(penalty)
        query.fill_(3)
        got = backend.score_tokens(*arguments)
        backend.record_queries(query, index, rows, None)
    side.synchronize()
    assert torch.equal(got, wanted)
    assert (rows[:-1] == 3).all()


@each_dtype
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_observing_and_steering_in_a_cuda_graph(backend, dtype, tokens):
    """Capture the launches in a graph; their inputs may change between replays."""
    heads, dim, width = 6, 128, 1000
    whole = torch.zeros(tokens, heads * dim + 64, dtype=dtype, device=DEVICE)
    # As in attention: a part of the fused projection.
    query = whole[:, 32:-32].view(tokens, heads, dim)
    index = torch.zeros(80, dtype=torch.int64, device=DEVICE)
    rows = torch.zeros(100, heads, dim, dtype=dtype, device=DEVICE)
    hidden = torch.zeros(tokens, width, dtype=dtype, device=DEVICE)
    coefficient, row = torch.zeros(80, device=DEVICE), torch.zeros(80, dtype=torch.int32, device=DEVICE)
    vectors = torch.zeros(5, width, device=DEVICE)

    def step() -> Tensor:
        backend.record_queries(query, index, rows, None)
        return backend.steer_add(hidden, coefficient, row, vectors)

    graph = capture(step, DEVICE)
    steered = graph.output

    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(4):
        whole.copy_(torch.randn(whole.shape, device=DEVICE, generator=generator))
        index.copy_(torch.randperm(100, device=DEVICE, generator=generator)[:80])
        rows.zero_()
        hidden.copy_(torch.randn(hidden.shape, device=DEVICE, generator=generator))
        coefficient.copy_(torch.randn(80, device=DEVICE, generator=generator))
        row.copy_(torch.randint(0, 5, (80,), device=DEVICE, generator=generator))
        vectors.copy_(torch.randn(vectors.shape, device=DEVICE, generator=generator))
        vectors[0] = torch.nan
        graph.replay()
        wanted = torch.zeros_like(rows)
        torch_backend.record_queries(query, index, wanted, None)
        assert torch.equal(rows[:-1], wanted[:-1])
        torch.testing.assert_close(steered, torch_backend.steer_add(hidden, coefficient, row, vectors))
        untouched = row[:tokens] == 0
        assert torch.equal(steered[untouched], hidden[untouched])
