"""`measure_attention` and `key_similarity` of every backend against `torch_backend`; see test_parity.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.ops import Effect, native, torch_backend
from skipkv_vllm.ops.paging import Layout
from tests.operators.backends import BACKENDS, INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import MeasureCase, Measuring, Pages, draw_pages

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

VEC, AMX = Pages(Layout.VEC), Pages(Layout.AMX, BF16, size=32)
MEASURES = {
    "plain": MeasureCase(),
    "no query counts": MeasureCase(counted=(0, 0)),
    "none of one request, all of the other": MeasureCase(counted=(0, 8)),
    "one query": MeasureCase(window=1, counted=(1, 1)),
    "one token": MeasureCase(lengths=(1, 2), counted=(1, 2), window=2),
    "as many queries as tokens": MeasureCase(lengths=(33, 20), counted=(33, 20), window=33, positions="sorted"),
    "queries that see few tokens": MeasureCase(positions="sorted", ahead=-30),
    "queries far ahead": MeasureCase(ahead=1000),
    "shuffled": MeasureCase(positions="shuffled"),
    "no group": MeasureCase(group=1),
    "group of three": MeasureCase(Pages(heads=3), group=3),
    "group of seven": MeasureCase(Pages(heads=1, dim=128), group=7, window=33, counted=(33, 31)),
    "pages of one token": MeasureCase(Pages(size=1)),
    "pages of five tokens": MeasureCase(Pages(size=5)),
    **{f"head size {dim}": MeasureCase(Pages(dim=dim, heads=1)) for dim in (32, 36, 80, 96, 112, 128, 192, 256)},
    "head size 128 in bf16": MeasureCase(Pages(dim=128, dtype=BF16), group=4),
    "long": MeasureCase(Pages(layers=1, heads=1), (700, 201, 48, 49, 96, 97), (20, 3, 20, 0, 20, 1), 20),
    **{
        f"many queries in {dtype}, {dim}": MeasureCase(
            Pages(dtype=dtype, layers=1, heads=1, dim=dim), (200, 130, 49), (20, 3, 20), 20, group=7
        )
        for dtype, dim in ((BF16, 128), (HALF, 64), (FP8["e4m3"], 128), (BF16, 256))
    },
    "alike in bf16": MeasureCase(Pages(dtype=BF16), keys="equal"),
    "one token in bf16": MeasureCase(Pages(dtype=BF16), lengths=(1, 2), counted=(1, 2), window=2),
    "queries that see few tokens in bf16": MeasureCase(Pages(dtype=BF16), positions="sorted", ahead=-30),
    "alike": MeasureCase(keys="equal"),
    "nothing": MeasureCase(keys="none"),
    "clusters": MeasureCase(keys="clusters", lengths=(150, 99)),
    **{f"bf16 {order}": MeasureCase(Pages(dtype=BF16, order=order)) for order in ("BHNC", "BNHC", "HBNC", "NBHC")},
    "half": MeasureCase(Pages(dtype=HALF)),
    **{f"{name} {o}": MeasureCase(Pages(dtype=FP8[name], order=o)) for name in FP8 for o in ("BHNC", "NBHC")},
    **{f"vec {dtype}": MeasureCase(replace(VEC, dtype=dtype)) for dtype in (FLOAT, BF16, HALF)},
    "vec, heads outside": MeasureCase(replace(VEC, order="HBNC", size=32)),
    "vec, pages of six": MeasureCase(replace(VEC, size=6)),
    **{f"{name} vec": MeasureCase(replace(VEC, dtype=FP8[name], size=32, order="HBNC")) for name in FP8},
    **{f"amx {dtype}": MeasureCase(replace(AMX, dtype=dtype)) for dtype in (FLOAT, BF16, HALF, *FP8.values())},
    "sinks": MeasureCase(Pages(layers=3), group=3, sinks=True),
    "sinks in bf16": MeasureCase(Pages(dtype=BF16, dim=128), sinks=True),
    "sinks in e4m3": MeasureCase(Pages(dtype=FP8["e4m3"]), group=8, sinks=True),
    "latents": MeasureCase(Pages(Layout.LATENT, heads=1, dim=576), group=8),
    "latents, many heads": MeasureCase(
        Pages(Layout.LATENT, layers=1, heads=1, dim=128), (150, 65), (11, 9), 11, 13, sinks=True
    ),
    "latents, two heads": MeasureCase(Pages(Layout.LATENT, HALF, "NBHC", dim=160, size=5), group=3),
    "latents in bf16": MeasureCase(Pages(Layout.LATENT, heads=1, dim=576, dtype=BF16), group=3),
    "amx, one tile": MeasureCase(replace(AMX, size=16, dim=16)),
    "amx, heads outside": MeasureCase(replace(AMX, order="HBNC", dim=48)),
}
FEW = (
    *("plain", "none of one request, all of the other", "one token", "queries that see few tokens"),
    *("sinks", "sinks in bf16", "group of three", "head size 80", "bf16 BNHC", "e4m3 BHNC", "e5m2 NBHC"),
    *("latents", "latents, many heads", "latents, two heads"),
)


def check_rows(got: Tensor, wanted: Tensor, lengths: Tensor, tolerance: float, size: float = 1e-3) -> None:
    """Check errors relative to the largest of a row, or to `size / length^2`, the size of the parts of the difference.

    The output of a single token is its value, so their difference is pure rounding.
    """
    for r, length in enumerate(lengths.tolist()):
        a, b = got[r, ..., :length].cpu(), wanted[r, ..., :length]
        error = (a - b).abs().amax(-1)
        allowed = tolerance * b.abs().amax(-1).clamp(min=size / length**2)
        assert (error <= allowed).all(), f"request {r}: error by layer and head: {error}, allowed: {allowed}"
        assert (got[r, ..., length:] == 0).all()


NEGLIGIBLE = 0.3
"""Share of a query's largest weight. Of random queries and keys a fair part of the weights are below it."""


def check_measure_case(backend: Backend, case: MeasureCase, effect: Effect) -> None:
    arguments = case.build()
    wanted = torch_backend.measure_attention(*arguments, effect, NEGLIGIBLE)
    got = backend.module.measure_attention(*on(backend.device, (*arguments, int(effect), NEGLIGIBLE)))
    assert got.dtype is torch.float32
    assert (got >= 0).all()
    tolerance = 2e-5 if case.pages.dtype is FLOAT else max(2e-5, backend.tolerance)
    if effect is Effect.NEGLIGIBLE:
        check_negligible(got, arguments, tolerance)
        return
    reads_values = effect in (Effect.OUTPUT, Effect.VALUE, Effect.KEY, Effect.JOINT)
    size = case.pages.dim * case.window if reads_values else 1.0
    check_rows(got, wanted, arguments.num_resident, tolerance, size)


def check_negligible(got: Tensor, arguments: Measuring, tolerance: float) -> None:
    """Check that every sum is what a slightly lower or a slightly higher share gives, or lies between them."""
    low, high = (
        torch_backend.measure_attention(*arguments, Effect.NEGLIGIBLE, NEGLIGIBLE * (1 + sign * 20 * tolerance))
        for sign in (-1, 1)
    )
    got = got.cpu()
    # A sum of shares of whole numbers of tokens, none of which is as small as what rounding adds.
    assert (got >= low - 1e-5).all()
    assert (got <= high + 1e-5).all()


def check_similarity_case(backend: Backend, case: MeasureCase) -> None:
    arguments = case.build()
    got = backend.module.key_similarity(*on(backend.device, arguments.keys()))
    assert got.dtype is torch.float32
    check_rows(got, torch_backend.key_similarity(*arguments.keys()), arguments.num_resident, 1e-5)


@pytest.mark.parametrize("effect", Effect, ids=lambda effect: effect.name.lower())
@cases(MEASURES, few=FEW)
def test_measure_attention(backend, case, effect):
    check_measure_case(backend, case, effect)


@cases(MEASURES, few=FEW)
def test_key_similarity(backend, case):
    check_similarity_case(backend, case)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name == "triton"], ids=str)
@pytest.mark.parametrize("effect", [Effect.OUTPUT, Effect.KEY, Effect.JOINT])
def test_weights_and_outputs_of_latents_are_not_rounded_to_the_dtype_of_the_cache(backend, effect, monkeypatch):
    if INTERPRETED:  # which multiplies in float32 otherwise
        monkeypatch.setattr("skipkv_vllm.ops.triton_backend.scoring.interpreted", lambda: False)
    case = MeasureCase(Pages(Layout.LATENT, HALF, heads=1, dim=128), group=3, keys="copies")
    check_measure_case(replace(backend, tolerance=2e-5), case, effect)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_attention_anywhere(data):
    if INTERPRETED or native.unavailable("cpu"):
        pytest.skip("native on the CPU only")
    pages = draw_pages(data, most_heads=4)
    requests = data.draw(st.lists(st.tuples(st.integers(1, 160), st.integers(0, 40)), min_size=1, max_size=3))
    lengths = [length for length, _ in requests]
    counted = [min(pair) for pair in requests]
    case = MeasureCase(
        pages,
        lengths,
        counted,
        max(1, *counted) + data.draw(st.integers(0, 3)) if max(counted) < min(lengths) else max(1, *counted),
        data.draw(st.integers(1, 8)),
        data.draw(st.sampled_from(("random", "clusters", "copies", "zeros", "late"))),
        data.draw(st.sampled_from(("sorted", "runs", "shuffled"))),
        data.draw(st.integers(-20, 20)),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 2**20)),
    )
    for effect in Effect:
        check_measure_case(Backend("native"), case, effect)
    check_similarity_case(Backend("native"), case)


def test_queries_that_do_not_count_change_nothing():
    arguments = MeasureCase(counted=(5, 3)).build()
    noise = arguments.queries.clone()
    noise[0, :, :3] = noise[1, :, :5] = float("nan")
    for effect in Effect:
        wanted = native.measure_attention(*arguments, effect, NEGLIGIBLE)
        assert torch.equal(native.measure_attention(*arguments._replace(queries=noise), effect, NEGLIGIBLE), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": torch.tensor([9, 0], dtype=torch.int32)}, "num_queries=9 must be from 0 to 8"),
        ({"num_queries": torch.tensor([-1, 0], dtype=torch.int32)}, "num_queries=-1"),
        ({"num_resident": torch.tensor([75, 0], dtype=torch.int32)}, "num_resident=0 must be above 0"),
        ({"newest": torch.tensor([75], dtype=torch.int32)}, "newest must have size 2"),
        ({"queries": torch.zeros(2, 2, 8, 3, 64)}, "3 query heads do not share 2 kv heads"),
        ({"table": torch.full((2, 5), 99, dtype=torch.int32)}, "names page 99 of"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    with pytest.raises(RuntimeError, match=message):
        native.measure_attention(*MeasureCase().build()._replace(**change), Effect.OUTPUT, 0.0)


def test_unknown_effects_are_refused():
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    with pytest.raises(RuntimeError, match="effect=7 is unknown"):
        native.measure_attention(*MeasureCase().build(), 7, 0.0)


def test_wrong_sums_are_noticed():
    arguments = MeasureCase(positions="sorted").build()
    for effect in Effect:
        wanted = torch_backend.measure_attention(*arguments, effect, NEGLIGIBLE)
        for other in (
            arguments._replace(newest=arguments.newest - 1),
            arguments._replace(num_queries=arguments.num_queries - 1),
            arguments._replace(queries=arguments.queries.flip(3)),
            arguments._replace(table=arguments.table.roll(1, dims=1).clamp(min=1)),
        ):
            found = torch_backend.measure_attention(*other, effect, NEGLIGIBLE)
            with pytest.raises(AssertionError):
                check_rows(found, wanted, arguments.num_resident, 2e-5)
