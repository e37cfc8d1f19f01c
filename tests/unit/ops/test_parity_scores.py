"""`score_tokens` of every backend against the torch backend, on random and adversarial inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.ops.paging import Layout
from tests.operators.backends import BACKENDS, INTERPRETED, Backend, cases, isa, on  # noqa: F401
from tests.operators.cases import Pages, ScoreCase, Scoring, draw_pages

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


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
    "ends": ScoreCase(Pages(layers=1, heads=2, dim=128), lengths=(300, 130), keys="ends", threshold=0.72),
    "ends, head size 80": ScoreCase(Pages(layers=1, heads=1, dim=80), lengths=(300,), keys="ends", threshold=0.72),
    "long clusters": ScoreCase(Pages(layers=1, heads=2), lengths=(500,), keys="clusters", threshold=0.72),
    "late": ScoreCase(Pages(layers=1, heads=2), lengths=(500, 333), keys="late", threshold=0.5),
    "late in bf16": ScoreCase(Pages(dtype=BF16, layers=1), lengths=(500, 333), keys="late", threshold=0.5),
    **{
        f"{keys} in {dtype}": ScoreCase(
            Pages(dtype=dtype, layers=1, dim=dim), (512, 333), keys=keys, threshold=threshold, positions="sorted"
        )
        for keys, threshold in (("thin", 0.995), ("bridges", 0.5))
        for dtype, dim in ((BF16, 64), (HALF, 144), (FP8["e4m3"], 128))
    },
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
    "latents": ScoreCase(Pages(Layout.LATENT, heads=1, dim=576), group=8),
    "latents, many heads": ScoreCase(Pages(Layout.LATENT, heads=1, dim=128), (150, 65), 21, window=5, penalty=True),
    "latents, large window": ScoreCase(Pages(Layout.LATENT, heads=2, dim=96, order="NBHC"), (150, 80), 3, window=70),
    "latents, copies": ScoreCase(Pages(Layout.LATENT, HALF, heads=1, dim=128), keys="copies", threshold=0.5, group=3),
    "latents, zeros": ScoreCase(Pages(Layout.LATENT, heads=1, dim=160), (60, 101), keys="zeros", threshold=-0.2),
    "latents in bf16": ScoreCase(
        Pages(Layout.LATENT, heads=1, dim=576, dtype=BF16), keys="clusters", threshold=0.5, group=3
    ),
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
    *(
        "e4m3, head size 36",
        "latents",
        "latents, many heads",
        "latents, large window",
        "latents, copies",
        "latents, zeros",
    ),
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
    f"{name} {Layout(k).name}": EveryByte(Pages(Layout(k), FP8[name], layers=1, heads=1, size=32, dim=96))
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
