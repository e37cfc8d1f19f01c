"""Every backend of the operators against `torch_backend`, on random and adversarial inputs.

Triton's kernels run on a GPU where there is one. Elsewhere its interpreter runs them in a process of its own, because
Triton decides when it is imported; one test starts that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.ops.paging import Layout
from tests.operators.backends import BACKENDS, INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import CompactCase, Compaction, Pages, ScoreCase, Scoring, draw_pages, positions_of

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# ---- score_tokens


def check_scores(got: Tensor, wanted: Tensor, lengths: Tensor, tolerance: float) -> None:
    for r, length in enumerate(lengths.tolist()):
        a, b = got[r, ..., :length].cpu(), wanted[r, ..., :length]
        # A score is a difference of parts of about 1 / length, which may cancel in a whole row of few tokens.
        error = (a - b).abs().amax(-1) / b.abs().amax(-1).clamp(min=1 / length)
        assert error.max() <= tolerance, f"request {r}: relative error {error.max():.1e} by layer and head: {error}"
        assert (got[r, ..., length:] == -torch.inf).all()


def check_score_case(backend: Backend, case: ScoreCase) -> None:
    arguments = case.build()
    before = [c.clone() for c in arguments.caches]
    got = backend.module.score_tokens(*on(backend.device, arguments))
    tolerance = 1e-5 if case.pages.dtype is FLOAT else backend.tolerance
    check_scores(got, torch_backend.score_tokens(*arguments), arguments.num_resident, tolerance)
    assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(arguments.caches, before, strict=True))


VEC, AMX = Pages(Layout.VEC), Pages(Layout.AMX, BF16, size=32)
SCORES = {
    "plain": ScoreCase(),
    "penalty": ScoreCase(penalty=True, mix=0.4),
    "one key older than the window": ScoreCase(lengths=(9, 40, 9)),
    "window of one": ScoreCase(window=1, lengths=(2, 17)),
    "pool wider than the row": ScoreCase(pool=63, lengths=(20, 30)),
    "no pool": ScoreCase(pool=1),
    "importance only": ScoreCase(mix=1.0),
    "redundancy only": ScoreCase(mix=0.0),
    "no group": ScoreCase(group=1),
    "group of eight": ScoreCase(Pages(heads=1), group=8),
    "group of seven": ScoreCase(Pages(heads=1, dim=128), group=7),
    "eight heads": ScoreCase(Pages(heads=8, layers=1)),
    "pages of one token": ScoreCase(Pages(size=1)),
    "pages of five tokens": ScoreCase(Pages(size=5)),
    "head size 32": ScoreCase(Pages(dim=32)),
    "head size 80": ScoreCase(Pages(dim=80)),
    "head size 128": ScoreCase(Pages(dim=128, dtype=BF16)),
    "head size 256": ScoreCase(Pages(dim=256, dtype=HALF)),
    "head size 36": ScoreCase(Pages(dim=36)),
    "long": ScoreCase(Pages(layers=1, heads=1), lengths=(700, 201, 48, 49, 96, 97), threshold=0.45),
    "long clusters": ScoreCase(Pages(layers=1, heads=2), lengths=(500,), keys="clusters", threshold=0.72),
    "late": ScoreCase(Pages(layers=1, heads=2), lengths=(500, 333), keys="late", threshold=0.5),
    "in order": ScoreCase(positions="sorted"),
    "shuffled": ScoreCase(positions="shuffled"),
    **{f"bf16 {order}": ScoreCase(Pages(dtype=BF16, order=order)) for order in ("BHNC", "BNHC", "HBNC", "NBHC")},
    "half": ScoreCase(Pages(dtype=HALF)),
    **{f"vec {dtype}": ScoreCase(replace(VEC, dtype=dtype)) for dtype in (FLOAT, BF16, HALF)},
    **{f"{name} {order}": ScoreCase(Pages(dtype=FP8[name], order=order)) for name in FP8 for order in ("BHNC", "NBHC")},
    **{f"{name} vec": ScoreCase(replace(VEC, dtype=FP8[name], size=32, order="HBNC")) for name in FP8},
    **{f"{name} amx": ScoreCase(replace(AMX, dtype=FP8[name])) for name in FP8},
    **{
        f"{name} clusters": ScoreCase(Pages(dtype=FP8[name], dim=128), (150, 65), penalty=True, keys="clusters")
        for name in FP8
    },
    "e4m3, head size 36": ScoreCase(Pages(dtype=FP8["e4m3"], dim=36), keys="copies", threshold=0.5),
    "e5m2, long": ScoreCase(Pages(dtype=FP8["e5m2"], layers=1, dim=80), lengths=(400,), keys="late", threshold=0.5),
    "vec, heads outside": ScoreCase(replace(VEC, order="HBNC", size=32)),
    "vec, pages of six": ScoreCase(replace(VEC, size=6)),
    **{f"amx {dtype}": ScoreCase(replace(AMX, dtype=dtype)) for dtype in (FLOAT, BF16, HALF)},
    "amx, one tile": ScoreCase(replace(AMX, size=16, dim=16)),
    "amx, heads outside": ScoreCase(replace(AMX, order="HBNC", dim=48)),
    **{
        f"{keys} at {threshold}": ScoreCase(lengths=(60, 101), keys=keys, threshold=threshold)
        for keys in ("random", "clusters", "copies", "zeros", "equal", "none", "late")
        for threshold in (-1.0, -0.2, 0.0, 0.1, 0.5, 0.95)
    },
    "random at 1": ScoreCase(threshold=1.0),
}


FEW_SCORES = (
    *("plain", "penalty", "bf16 BNHC", "one key older than the window", "copies at 0.5", "zeros at -0.2"),
    *(f"{name} {kind}" for name in FP8 for kind in ("BHNC", "clusters")),
    "e4m3, head size 36",
)


@cases(SCORES, few=FEW_SCORES)
def test_score_tokens(backend, case):
    check_score_case(backend, case)


@dataclass(frozen=True)
class EveryByte:
    """A call of `score_tokens` in which each key is one number of 8 bits, which its importance reveals."""

    pages: Pages

    def build(self) -> tuple[Scoring, Tensor]:
        """Return the arguments and the expected logits."""
        bits = torch.arange(256, dtype=torch.uint8).view(self.pages.dtype)
        values = bits.float()[bits.float().isfinite()]
        keys = torch.zeros(1, 1, values.shape[0] + 1, self.pages.dim)
        keys[0, 0, :-1, 5] = values
        plain = ScoreCase(self.pages, (keys.shape[2],), 1, window=1, pool=1, mix=1.0, positions="sorted").build()
        cache = self.pages.empty(int(plain.table.max()) + 1)
        self.pages.write_keys(cache, plain.table[0], keys)
        queries = torch.zeros_like(plain.queries)
        # So that the largest number gives a logit of 10, and the smallest is visible.
        queries[..., 5] = 10 * self.pages.dim**0.5 / values.max()
        arguments = plain._replace(caches=cache.caches, pointers=cache.pointers, queries=queries)
        return arguments, (10 * values.double() / values.max().double())


def check_every_byte(backend: Backend, case: EveryByte) -> None:
    arguments, logits = case.build()
    scores = backend.module.score_tokens(*on(backend.device, arguments)).cpu()[0, 0, 0, : logits.shape[0]]
    torch.testing.assert_close(scores.double(), logits.softmax(0), rtol=3e-6, atol=0)


BYTES_OF = {
    f"{name} {Layout(k).name}": EveryByte(Pages(Layout(k), FP8[name], layers=1, heads=1, size=32))
    for name in FP8
    for k in Layout
}


@cases(BYTES_OF, few=[f"{name} ROWS" for name in FP8])
def test_every_number_of_8_bits_is_read_as_it_is(backend, case):
    check_every_byte(backend, case)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", FP8.values(), ids=FP8)
def test_no_number_is_read_as_none(backend, dtype):
    """A key that is NaN must not give a score that looks like a number."""
    arguments = ScoreCase(Pages(dtype=dtype, layers=1, heads=1), (40,), mix=0.0).build()
    for cache in arguments.caches:
        cache.view(torch.uint8).fill_(0x7F)
    assert backend.module.score_tokens(*on(backend.device, arguments))[..., :32].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_queries_for_keys_of_8_bits_are_float32(backend):
    arguments = ScoreCase(Pages(dtype=FP8["e4m3"])).build()
    for wrong in (
        arguments._replace(queries=arguments.queries.bfloat16()),
        arguments._replace(caches=[c.view(torch.uint8) for c in arguments.caches]),
    ):
        with pytest.raises((RuntimeError, KVPolicyError), match=r"float32|Float"):
            backend.module.score_tokens(*on(backend.device, wrong))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_score_tokens_anywhere(data):
    if INTERPRETED or native.unavailable("cpu"):
        pytest.skip("native on the CPU only")
    pages = draw_pages(data, most_heads=8)
    window = data.draw(st.integers(1, 20))
    case = ScoreCase(
        pages,
        data.draw(st.lists(st.integers(window + 1, 160), min_size=1, max_size=3)),
        data.draw(st.integers(1, 8)),
        window,
        data.draw(st.sampled_from((1, 3, 7, 21))),
        data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        data.draw(st.floats(-1, 1, width=16)),
        data.draw(st.sampled_from(("random", "clusters", "copies", "zeros", "late"))),
        data.draw(st.sampled_from(("sorted", "runs", "shuffled"))),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 2**20)),
    )
    check_score_case(Backend("native"), case)


def test_wrong_scores_are_noticed():
    arguments = ScoreCase(Pages(dtype=BF16)).build()
    wanted = torch_backend.score_tokens(*arguments)
    for other in (
        arguments._replace(threshold=arguments.threshold + 0.05),
        arguments._replace(pool=5),
        arguments._replace(positions=arguments.positions.flip(1)),
        arguments._replace(table=arguments.table.roll(1, dims=1).clamp(min=1)),
    ):
        with pytest.raises(AssertionError):
            check_scores(torch_backend.score_tokens(*other), wanted, arguments.num_resident, 1e-5)


# ---- select_keep


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


# ---- compact_pages


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


# ---- all of them


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == Backend("native")], ids=str)
def test_the_number_of_threads_changes_no_bit(backend):
    scoring, selection = ScoreCase(lengths=(200, 90, 33)).build(), SelectCase().build()
    compaction = CompactCase(Pages(heads=8)).build()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        moved = compaction.copy()
        native.compact_pages(*moved)
        results.append([native.score_tokens(*scoring), *native.select_keep(*selection), moved.sidecar, *moved.caches])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_triton_in_its_interpreter():
    """Run the parity tests of Triton in a process whose Triton interprets; see above."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("Triton's own tests run in this process")
    pytest.importorskip("triton")
    pytest.importorskip("skipkv_vllm.ops.triton_backend", reason="the Triton backend is not there")
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_parity*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton-cpu", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
