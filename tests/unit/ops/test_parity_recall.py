"""Tokens on their way to the store and back: pages of every layout, and Triton against the torch backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.core.limits import STORED_PAGE
from skipkv_vllm.ops import torch_backend
from skipkv_vllm.ops.paging import Layout, PagedCache, layer_pages
from tests.operators.backends import BACKENDS, cases, isa, on  # noqa: F401
from tests.operators.cases import FP8, Pages, tables

BF16, HALF = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class RecallCase:
    """Two requests whose tokens lie in the cache and go to the store.

    Attributes:
        pages: description of the caches.
        lengths: tokens that each holds.
        spans: first slot, number and place of those that are stored.
        group: query heads for each kv head.
        window: queries.
    """

    pages: Pages = field(default_factory=Pages)
    lengths: tuple[int, int] = (90, 40)
    spans: tuple[tuple[int, int, int], ...] = ((5, 80, 60), (0, 33, 3))
    group: int = 2
    window: int = 8

    def build(self) -> dict[str, Any]:
        """Return the inputs of all four operators."""
        generator, pages = torch.Generator().manual_seed(3), self.pages
        layers, heads, dim, requests = pages.layers, pages.heads, pages.dim, len(self.lengths)
        table = tables(self.lengths, pages.size, generator)
        cache = pages.empty(int(table.max()) + 1)
        for row, length in zip(table, self.lengths, strict=True):
            pages.write_keys(cache, row, torch.randn(layers, heads, length, dim, generator=generator))
            pages.write_values(cache, row, torch.randn(layers, heads, length, dim, generator=generator))
        stored_table = torch.tensor([[4, 1, 2], [0, 3, 5]], dtype=torch.int32)
        return {
            "cache": cache,
            "table": table,
            "spans": torch.tensor(self.spans, dtype=torch.int32),
            "stored_table": stored_table,
            "moments": (
                0.3 * torch.randn(requests, layers, heads, dim, generator=generator),
                torch.rand(requests, layers, heads, dim, generator=generator) + 0.5,
            ),
            "queries": torch.randn(requests, layers, self.window, self.group * heads, dim, generator=generator),
        }

    def empty_store(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return an empty store, with the sketches."""
        shape = (6, self.pages.layers, self.pages.heads, STORED_PAGE)
        dim = self.pages.dim
        return (
            torch.zeros(*shape, 2 * dim, dtype=self.pages.dtype),
            torch.zeros(*shape, dim // 8, dtype=torch.uint8),
            torch.zeros(shape),
        )

    @property
    def number(self) -> Tensor:
        """Stored tokens of each request, from place 0 on."""
        return torch.tensor([place + number for _, number, place in self.spans], dtype=torch.int32)


CASES = {
    "float32": RecallCase(),
    "bfloat16, large heads": RecallCase(Pages(dtype=BF16, dim=128), group=7),
    "float16, few queries": RecallCase(Pages(dtype=HALF, heads=1, dim=80), group=3, window=5),
    "fp8": RecallCase(Pages(dtype=FP8[0])),
    "16 queries": RecallCase(Pages(layers=1, dim=64), group=4, window=16),
}
FEW = tuple(CASES)


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, which may hold NaN."""
    return tensor.contiguous().view(torch.uint8)


def run_on(backend: Any, op: str, arguments: list[Any]) -> tuple[Any, list[Any]]:
    """Return an operator's result and its arguments afterwards."""
    moved = on(backend.device, arguments)
    result = getattr(backend.module, op)(*moved)
    return None if result is None else result.cpu(), [
        each.cpu() if isinstance(each, Tensor) else each for each in moved
    ]


TRITON = [backend for backend in BACKENDS if backend.name == "triton"]


def triton_cases() -> Any:
    """Parametrise with Triton, where it runs, and all cases."""
    chosen = [(backend, case) for backend in TRITON for case in CASES.values()]
    names = [f"{backend}-{name}".replace(" ", "-") for backend in TRITON for name in CASES]
    return pytest.mark.parametrize(("backend", "case"), chosen, ids=names)


@triton_cases()
def test_key_moments(backend: Any, case: RecallCase) -> None:
    given = case.build()
    arguments = [*given["cache"], given["table"], torch.tensor([2, 0]).int(), torch.tensor([77, 33]).int()]
    found, _ = run_on(backend, "key_moments", arguments)
    torch.testing.assert_close(found, torch_backend.key_moments(*arguments), rtol=1e-4, atol=1e-5)


@triton_cases()
def test_store_tokens(backend: Any, case: RecallCase) -> None:
    given, expected, found = case.build(), case.empty_store(), case.empty_store()
    arguments = [*given["cache"], given["table"], given["spans"], given["stored_table"], *given["moments"]]
    torch_backend.store_tokens(*arguments, *expected)
    _, after = run_on(backend, "store_tokens", [*arguments, *found])
    stored, signs, sizes = after[-3:]
    assert torch.equal(bits(stored), bits(expected[0]))
    assert torch.equal(signs, expected[1])
    torch.testing.assert_close(sizes, expected[2], rtol=1e-5, atol=1e-6)


@triton_cases()
def test_stored_attention(backend: Any, case: RecallCase) -> None:
    given, store = case.build(), case.empty_store()
    torch_backend.store_tokens(
        *(*given["cache"], given["table"], given["spans"], given["stored_table"], *given["moments"], *store)
    )
    arguments = [*store[1:], given["stored_table"], case.number, given["queries"], int(case.number.max())]
    found, _ = run_on(backend, "stored_attention", arguments)
    expected = torch_backend.stored_attention(*arguments)
    assert (expected[0] > 0).all()
    assert (expected[1, :, :, int(case.number[1]) :] == 0).all()
    torch.testing.assert_close(found, expected, rtol=backend.tolerance, atol=1e-6)


def recalled(case: RecallCase) -> tuple[list[Any], Tensor, Tensor]:
    """Return arguments of `recall_tokens` after a store, its slots and places."""
    given, store, generator = case.build(), case.empty_store(), torch.Generator().manual_seed(7)
    torch_backend.store_tokens(
        *(*given["cache"], given["table"], given["spans"], given["stored_table"], *given["moments"], *store)
    )
    shape = (len(case.lengths), case.pages.layers, case.pages.heads)
    slots = torch.rand(*shape, 33, generator=generator).argsort(-1)[..., :21].int()
    places = torch.randint(-1, 30, (*shape, 21), generator=generator, dtype=torch.int32)
    places += case.spans[1][2] * (places >= 0)
    sidecar = torch.zeros(case.pages.layers, len(given["cache"].caches[0]), case.pages.heads, case.pages.size).int()
    arguments = [*given["cache"], sidecar, given["table"], slots, places, torch.tensor([100, 7], dtype=torch.int32)]
    return [*arguments, given["stored_table"], store[0]], slots, places


@triton_cases()
def test_recall_tokens(backend: Any, case: RecallCase) -> None:
    arguments, _, _ = recalled(case)
    again, _, _ = recalled(case)
    torch_backend.recall_tokens(*again)
    _, found = run_on(backend, "recall_tokens", arguments)
    assert torch.equal(found[3], again[3])
    for one, other in zip(found[0], again[0], strict=True):
        assert torch.equal(bits(one.cpu()), bits(other))


LAYOUTS = {
    **{f"{layout.name} {dtype}": RecallCase(Pages(layout, dtype, size=32)) for layout in Layout for dtype in (BF16,)},
    "fp8": RecallCase(Pages(dtype=FP8[0])),
    "float32, tokens first": RecallCase(Pages(order="BNHC")),
}
del LAYOUTS[f"{Layout.LATENT.name} {BF16}"]


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=list(LAYOUTS))
def test_tokens_come_back_as_they_left(case: RecallCase) -> None:
    """What is read from the pages after a recall is what was there when the tokens were stored."""
    arguments, slots, places = recalled(case)
    before = contents(case, arguments)
    torch_backend.recall_tokens(*arguments)
    after, sidecar = contents(case, arguments), arguments[3]
    first_position = arguments[7]
    for r, (first_slot, _, first_place) in enumerate(case.spans):
        # Only what was stored here is known; the places before are of an earlier copy, here zeros.
        for index in (slots[r] >= 0).nonzero().tolist():
            layer, head, m = index
            slot, place = int(slots[r, layer, head, m]), int(places[r, layer, head, m])
            found = after[r][layer, head, slot]
            if place < 0:
                assert torch.equal(bits(found), bits(before[r][layer, head, slot]))
            elif place < first_place:
                assert not found.float().any()
            else:
                assert torch.equal(bits(found), bits(before[r][layer, head, first_slot + place - first_place]))
            page, offset = int(arguments[4][r, slot // case.pages.size]), slot % case.pages.size
            noted = int(first_position[r]) + place if place >= 0 else 0
            assert int(sidecar[layer, page, head, offset]) == noted


def contents(case: RecallCase, arguments: list[Any]) -> list[Tensor]:
    """Return keys and values of each request by slot, `[L, H, N, 2 * D]`."""
    cache, table = PagedCache(*arguments[:3]), arguments[4]
    found = []
    for row, length in zip(table, case.lengths, strict=True):
        used = row[: -(-length // case.pages.size)].long()
        layers = [layer_pages(each, Layout(cache.layout)) for each in cache.caches]
        parts = [[view.read_pages(used, length) for view in (each.keys, each.values)] for each in layers]
        found.append(torch.stack([torch.cat(each, dim=-1) for each in parts]))
    return found


def test_sketches_estimate_the_attention() -> None:
    """Weights by sketches follow the exact ones, and moments are mean and deviation of the keys."""
    case = RecallCase(spans=((0, 90, 0), (0, 40, 0)), group=1, window=1)
    given, store = case.build(), case.empty_store()
    ends = torch.tensor(case.lengths, dtype=torch.int32)
    moments = torch_backend.key_moments(*given["cache"], given["table"], ends * 0, ends)
    keys = [each[..., : case.pages.dim] for each in contents(case, [*given["cache"], None, given["table"]])]
    torch.testing.assert_close(moments[0, 0], keys[0].mean(2))
    torch.testing.assert_close(moments[1, 1], keys[1].std(2, correction=0))
    torch_backend.store_tokens(
        *(*given["cache"], given["table"], given["spans"], given["stored_table"], *moments, *store)
    )
    queries = given["queries"]
    scaled = queries * moments[1].repeat_interleave(case.group, dim=2)[:, :, None]
    found = torch_backend.stored_attention(*store[1:], given["stored_table"], case.number, scaled, 90)
    correlations = []
    for r, length in enumerate(case.lengths):
        grouped = queries[r].unflatten(2, (case.pages.heads, case.group)).permute(0, 2, 3, 1, 4)
        exact = (grouped @ keys[r][:, :, None].mT / case.pages.dim**0.5).softmax(-1).mean(2).amax(2)
        for row, other in zip(found[r, ..., :length].flatten(0, 1), exact.flatten(0, 1), strict=True):
            correlations.append(float(torch.corrcoef(torch.stack([row, other]).log())[0, 1]))
    assert min(correlations) > 0.5
    assert sum(correlations) / len(correlations) > 0.7, correlations
