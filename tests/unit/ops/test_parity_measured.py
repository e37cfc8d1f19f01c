"""`vector_norms`, `pool_neighbours` and `central_tokens` of every backend against `torch_backend`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.ops.paging import Layout
from tests.operators.backends import INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import MeasureCase, Pages, draw_pages
from tests.operators.measured_cases import WHOLE, CentralCase, NormsCase, PoolCase
from tests.unit.ops.test_parity_attention import FEW, MEASURES

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
VEC, AMX = Pages(Layout.VEC), Pages(Layout.AMX, torch.bfloat16, size=32)

KINDS = {
    "key norm": NormsCase(),
    "value sum": NormsCase(values=True, norm=1),
    "value from weighted sum": NormsCase(values=True, part=WHOLE, weighted=True),
    "value from mean": NormsCase(values=True, part=WHOLE),
    "key from mean": NormsCase(part=WHOLE),
    "key from mean of five": NormsCase(part=5),
    "sums of parts": NormsCase(values=True, norm=1, part=33, weighted=True),
}
NORMS = {
    f"{kind}, {name}": replace(norms, held=held) for kind, norms in KINDS.items() for name, held in MEASURES.items()
}
FEW_NORMS = [f"{kind}, {name}" for kind in KINDS for name in ("one token", *FEW[4:])]

POOLS = {
    "plain": PoolCase(),
    "in order": PoolCase(positions="sorted"),
    "runs": PoolCase(positions="runs"),
    "none": PoolCase(pool=1),
    "wider than the row": PoolCase(pool=63, lengths=(20, 9)),
    "no window": PoolCase(window=0, lengths=(1, 40)),
    "one old token": PoolCase(lengths=(9, 75), pool=5),
    "long": PoolCase(lengths=(700, 201, 64, 65), shape=(1, 2)),
}

CENTRAL = {
    "plain": CentralCase(),
    "in order": CentralCase(shuffled=False),
    "clusters": CentralCase(keys="clusters"),
    "tokens of no segment": CentralCase(begin=100, written=(260, 201)),
    "more tokens than quota everywhere": CentralCase(quotas=(4, 2), lengths=(132, 190)),
    "as many as clusters": CentralCase(Pages(heads=1), (150, 90), (150, 90), longest=128, quotas=(64, 32)),
    "pairs": CentralCase(longest=16, quotas=(4,), written=(90, 150)),
    "long segments": CentralCase(Pages(layers=1, heads=1), (400,), (600,), longest=300, quotas=(64, 16)),
    "pages of five tokens": CentralCase(Pages(size=5)),
    **{f"head size {dim}": CentralCase(Pages(dim=dim, heads=1)) for dim in (32, 80, 128, 256)},
    "bf16 BNHC": CentralCase(Pages(dtype=torch.bfloat16, order="BNHC")),
    "half": CentralCase(Pages(dtype=torch.float16)),
    **{f"{name} BHNC": CentralCase(Pages(dtype=dtype)) for name, dtype in FP8.items()},
    **{f"vec {dtype}": CentralCase(replace(VEC, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)},
    "vec, pages of six": CentralCase(replace(VEC, size=6)),
    "latents": CentralCase(Pages(Layout.LATENT, heads=1, dim=576)),
    "latents in bf16": CentralCase(Pages(Layout.LATENT, torch.bfloat16, "NBHC", dim=96), keys="clusters"),
    "amx": CentralCase(AMX),
    "e4m3 amx": CentralCase(replace(AMX, dtype=FP8["e4m3"])),
}
FEW_CENTRAL = (
    "plain",
    "tokens of no segment",
    "pairs",
    "head size 80",
    "bf16 BNHC",
    "e4m3 BHNC",
    "latents",
    "latents in bf16",
)


def check_norms_case(backend: Backend, case: NormsCase) -> None:
    arguments = case.build()
    got = backend.module.vector_norms(*on(backend.device, arguments))
    assert got.dtype is torch.float32
    wanted = torch_backend.vector_norms(*arguments)
    for r, length in enumerate(case.held.lengths):
        a, b = got[r, ..., :length].cpu(), wanted[r, ..., :length]
        # The distance of a single token from the mean is pure rounding.
        assert ((a - b).abs().amax(-1) <= 1e-5 * b.amax(-1).clamp(min=1)).all()
        assert (got[r, ..., length:] == 0).all()


def check_pool_case(backend: Backend, case: PoolCase) -> None:
    arguments = case.build()
    got = backend.module.pool_neighbours(*on(backend.device, arguments))
    assert torch.equal(got.cpu(), torch_backend.pool_neighbours(*arguments))


def check_central_case(backend: Backend, case: CentralCase) -> None:
    arguments = case.build()
    wanted = torch_backend.central_tokens(*arguments)
    got = backend.module.central_tokens(*on(backend.device, arguments)).cpu()
    assert got.dtype is torch.bool
    assert wanted.any()
    assert torch.equal(got, wanted), f"{int((got != wanted).sum())} of {int(wanted.sum())} differ"


@cases(NORMS, few=FEW_NORMS)
def test_vector_norms(backend, case):
    check_norms_case(backend, case)


@cases(POOLS, few=POOLS)
def test_pool_neighbours(backend, case):
    check_pool_case(backend, case)


@cases(CENTRAL, few=FEW_CENTRAL)
def test_central_tokens(backend, case):
    check_central_case(backend, case)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_anywhere(data):
    if INTERPRETED or native.unavailable("cpu"):
        pytest.skip("native on the CPU only")
    pages, order = draw_pages(data, most_heads=4), data.draw(st.sampled_from(("sorted", "runs", "shuffled")))
    lengths = data.draw(st.lists(st.integers(1, 160), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 2**20))
    held = MeasureCase(pages, lengths, [0] * len(lengths), 1, positions=order, seed=seed)
    flags = (data.draw(st.booleans()), data.draw(st.integers(1, 2)), data.draw(st.sampled_from((0, 1, 7, 50, WHOLE))))
    check_norms_case(Backend("native"), NormsCase(held, *flags, weighted=data.draw(st.booleans())))
    window = data.draw(st.integers(0, min(lengths) - 1))
    pool = data.draw(st.sampled_from((1, 3, 7, 21)))
    check_pool_case(Backend("native"), PoolCase(lengths, window, pool, order, seed=seed))
    texts = [length + window + data.draw(st.integers(0, 100)) for length in lengths]
    text = CentralCase(
        pages,
        lengths,
        texts,
        data.draw(st.integers(0, min(texts))),
        min(window, min(lengths)),
        data.draw(st.integers(1, 80)),
        data.draw(st.sampled_from(((4, 1, 64), (2, 8, 16, 80), (1,)))),
        seed=seed,
    )
    arguments = text.build()
    assert torch.equal(native.central_tokens(*arguments), torch_backend.central_tokens(*arguments))


def test_keys_that_are_no_numbers_are_survived():
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    arguments = CentralCase().build()
    for cache in arguments.caches:
        cache.fill_(float("nan"))
    native.central_tokens(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 3}, "norm=3 must be 1 or 2"),
        ({"part": -1}, "part=-1 must not be negative"),
        ({"weights": torch.zeros(2, 2, 2, 5)}, "weights must have size 78"),
        ({"table": torch.full((2, 5), 99, dtype=torch.int32)}, "names page 99 of"),
    ],
)
def test_bad_norms_are_refused(change, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    with pytest.raises(RuntimeError, match=message):
        native.vector_norms(*NormsCase().build()._replace(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": 4}, "pool=4 must be odd"),
        ({"window": 33}, "num_resident=33 must be above the window of 33"),
        ({"num_resident": torch.tensor([79, 9], dtype=torch.int32)}, "num_resident=79 must be"),
    ],
)
def test_bad_pools_are_refused(change, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    with pytest.raises(RuntimeError, match=message):
        native.pool_neighbours(*PoolCase().build()._replace(**change))


def test_wrong_choices_are_noticed():
    arguments = CentralCase().build()
    wanted = torch_backend.central_tokens(*arguments)
    for other in (
        arguments._replace(begin=arguments.begin + 1),
        arguments._replace(end=arguments.end - 1),
        arguments._replace(quota=arguments.quota.roll(1, dims=1)),
        arguments._replace(table=arguments.table.roll(1, dims=1).clamp(min=1)),
        arguments._replace(longest=arguments.longest + 1),
    ):
        assert not torch.equal(torch_backend.central_tokens(*other), wanted)
