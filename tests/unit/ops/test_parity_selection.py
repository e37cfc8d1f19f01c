"""`select_keep` and `compact_pages` of every backend against the torch backend, on random and adversarial inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.ops.paging import Layout
from tests.operators.backends import BACKENDS, INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import CompactCase, Compaction, Pages, positions_of
from tests.unit.ops.test_parity_scores import BF16, FLOAT, FP8, HALF, as_bytes


@dataclass(frozen=True)
class SelectCase:
    """A call of `select_keep`; `values` are the possible scores, none for random ones."""

    lengths: tuple[int, ...] = (75, 40, 129)
    keeps: tuple[int, ...] = (50, 33, 20)
    values: tuple[float, ...] = ()
    pinned: tuple[int, int] = (3, 5)
    """tokens at the lowest and at the highest positions"""
    positions: str = "shuffled"
    seed: int = 0

    def build(self) -> list[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.lengths), 2, 3, max(self.lengths) + 2)
        scores = torch.randn(shape, generator=generator)
        if self.values:
            scores = torch.tensor(self.values)[torch.randint(len(self.values), shape, generator=generator)]
        positions = positions_of(shape, self.lengths, self.positions, generator)
        # All rows pin the same tokens, so rows of a request share their first and last positions.
        below, above = [], []
        for r, (length, keep) in enumerate(zip(self.lengths, self.keeps, strict=True)):
            first = min(self.pinned[0], keep)
            last = min(self.pinned[1], keep - first)
            rank = positions[r, ..., :length].argsort(-1).argsort(-1).int()
            positions[r, ..., :length] = torch.where(rank < first, rank, rank + 1000)
            below.append(first)
            above.append(1000 + length - last)
        numbers = [torch.tensor(each, dtype=torch.int32) for each in (self.lengths, self.keeps, below, above)]
        most = max(1, *(min(k, n - k) for k, n in zip(self.keeps, self.lengths, strict=True)))
        return [scores, positions, *numbers, most]


def check_selection(got: tuple[Tensor, ...], arguments: list[Any]) -> None:
    for name, a, b in zip(("source", "hole", "count"), got, torch_backend.select_keep(*arguments), strict=True):
        assert a.dtype is torch.int32
        assert torch.equal(a.cpu(), b), name


INF = float("inf")
SELECTIONS = {
    "random": SelectCase(),
    "two scores": SelectCase(values=(0.25, 0.5)),
    "equal scores": SelectCase(values=(-1.5,)),
    "signed zeros": SelectCase(values=(0.0, -0.0)),
    "neighbouring floats": SelectCase(values=(1.0, 1.0 + 2**-23, 1.0 - 2**-24)),
    "tiny scores": SelectCase(values=(1e-45, -1e-45, 0.0, 1e-38, -1e-38)),
    "infinities": SelectCase(values=(INF, -INF, 0.0)),
    "nothing leaves": SelectCase(keeps=(75, 40, 129)),
    "one leaves": SelectCase(keeps=(74, 39, 128)),
    "one stays": SelectCase(keeps=(1, 1, 1), pinned=(0, 1)),
    "none stays": SelectCase(keeps=(0, 0, 0), pinned=(0, 0)),
    "only the pinned stay": SelectCase(keeps=(8, 8, 8)),
    "nothing is pinned": SelectCase(pinned=(0, 0)),
    "in order": SelectCase(positions="sorted"),
    "long": SelectCase((3000,), (1024,), positions="runs"),
    "long ties": SelectCase((3000, 2500), (1024, 1300), values=tuple(i / 8 for i in range(9)), positions="runs"),
}


@cases(SELECTIONS, few=("random", "two scores", "infinities", "one leaves", "nothing leaves"))
def test_select_keep(backend, case):
    arguments = case.build()
    check_selection(backend.module.select_keep(*on(backend.device, arguments)), arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=3),
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    pinned=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 2**20),
)
def test_select_keep_anywhere(sizes, values, pinned, seed):
    if INTERPRETED or native.unavailable("cpu"):
        pytest.skip("native on the CPU only")
    lengths = tuple(length for length, _ in sizes)
    keeps = tuple(round(length * share) for length, share in sizes)
    arguments = SelectCase(lengths, keeps, tuple(values), pinned, seed=seed).build()
    check_selection(native.select_keep(*arguments), arguments)


def test_wrong_moves_are_noticed():
    arguments = [*SelectCase(values=(0.25, 0.5)).build()[:-1], 60]
    for i, change in (
        (0, 1 - arguments[0]),
        (1, arguments[1].flip(1)),
        (3, arguments[3] - 1),
        (4, arguments[4] + 1009),
    ):
        other = [*arguments[:i], change, *arguments[i + 1 :]]
        with pytest.raises(AssertionError):
            check_selection(torch_backend.select_keep(*other), arguments)


def check_compaction(got: Compaction, wanted: Compaction) -> None:
    for i, (a, b) in enumerate(zip(got.caches, wanted.caches, strict=True)):
        same = as_bytes(a.cpu()) == as_bytes(b)
        assert same.all(), f"layer {i}: pages {(~same).flatten(1).any(1).nonzero().flatten().tolist()} differ"
    assert torch.equal(got.sidecar.cpu(), wanted.sidecar)


BYTES = torch.uint8
COMPACTIONS = {
    "plain": CompactCase(),
    "nothing is fresh": CompactCase(fresh=0.0),
    "everything is fresh": CompactCase(fresh=1.0),
    "shared pages": CompactCase(lengths=(75, 90, 61), keeps=(50, 48, 49), shared=2, fresh=1.0),
    "latents": CompactCase(Pages(Layout.LATENT, BF16, heads=1, dim=576)),
    "latents of an odd size": CompactCase(Pages(Layout.LATENT, HALF, "NBHC", dim=67, size=5), fresh=1.0),
    "nothing leaves": CompactCase(keeps=(75, 49)),
    "one leaves": CompactCase(keeps=(74, 48)),
    "one stays": CompactCase(keeps=(1, 1)),
    "pages of one token": CompactCase(Pages(size=1)),
    "pages of five tokens": CompactCase(Pages(size=5, dim=24)),
    "eight heads": CompactCase(Pages(heads=8)),
    **{
        f"{dtype} {order}": CompactCase(Pages(dtype=dtype, order=order))
        for dtype in (BYTES, FP8["e4m3"], BF16, FLOAT)
        for order in ("BHNC", "BNHC", "HBNC", "NBHC")
    },
    **{
        f"{layout.name} {dtype} {order}": CompactCase(Pages(layout, dtype, order, size=32, dim=dim))
        for layout in (Layout.VEC, Layout.AMX)
        for dtype, dim in ((BYTES, 32), (FP8["e5m2"], 64), (BF16, 128), (HALF, 48), (FLOAT, 64))
        for order in ("BHNC", "HBNC")
    },
}


@cases(
    COMPACTIONS,
    few=(
        "plain",
        "shared pages",
        "nothing leaves",
        "pages of five tokens",
        "torch.bfloat16 BNHC",
        "torch.float8_e4m3fn BHNC",
        "latents",
    ),
)
@pytest.mark.parametrize("seed", [0, 1])
def test_compact_pages(backend, case, seed):
    wanted = replace(case, seed=seed).build()
    got = Compaction(*on(backend.device, wanted.copy()))
    backend.module.compact_pages(*got)
    torch_backend.compact_pages(*wanted)
    check_compaction(got, wanted)


def test_wrong_pages_are_noticed():
    start = CompactCase(Pages(Layout.AMX, BF16, size=32)).build()
    wanted = start.copy()
    torch_backend.compact_pages(*wanted)
    with pytest.raises(AssertionError):
        check_compaction(start.copy(), wanted)
    for change in (
        {"hole": start.hole.flip(1)},
        {"count": start.count // 2},
        {"layout": Layout.VEC},
        {"positions": start.positions.flip(1)},
        {"target_table": start.source_table},
    ):
        other = start.copy()._replace(**change)
        torch_backend.compact_pages(*other)
        with pytest.raises(AssertionError):
            check_compaction(other, wanted)
