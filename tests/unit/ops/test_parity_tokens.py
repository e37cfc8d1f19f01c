"""The operators that run at every step: every backend against the torch backend."""

from __future__ import annotations

import pytest
import torch

from skipkv_vllm.ops import KEYWORD_SHIFT, STATE, native, torch_backend
from tests.operators.backends import INTERPRETED, Backend, cases, each_backend, isa, on  # noqa: F401
from tests.operators.thought_cases import check_thoughts
from tests.unit.ops.test_parity_sentences import BF16, FLOAT, HALF


@each_backend
@pytest.mark.parametrize("seed", range(12))
def test_track_thoughts(backend, seed):
    check_thoughts(backend.module, seed, backend.device, steps=5 if backend.whole else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 9}, "row 9 of 2"),
        ({"number": 9}, "exceeds the step"),
        ({"token": 77}, "token id 77 of 10"),
        ({"written": 99}, "written=99"),
        ({"interval": 0}, "interval=0"),
        ({"flags": 5 << KEYWORD_SHIFT}, "no entry for state 0 and class 5"),
    ],
)
def test_bad_arguments_of_track_thoughts_are_refused(change, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    given = {"slot": 0, "number": 3, "token": 1, "written": 0, "interval": 128, "flags": 0} | change
    vocabulary = torch.full((10,), given["flags"], dtype=torch.int32)
    spans = torch.tensor([[given["slot"]], [0], [given["number"]], [5]])
    with pytest.raises(RuntimeError, match=message):
        native.track_thoughts(
            *(torch.full((3,), given["token"]), spans, vocabulary, torch.zeros(1, 1, dtype=torch.int32)),
            *(True, given["interval"], torch.zeros(2, 3), torch.zeros(2, len(STATE), dtype=torch.int32)),
            *(given["written"], torch.zeros(4, dtype=torch.int32), torch.zeros(4)),
        )


STRIDES = ("contiguous", "part of a row", "transposed")


def strided(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the same values with other strides."""
    if kind == "part of a row":
        wide = torch.full((values.shape[0], values[0].numel() + 24), float("nan"), dtype=values.dtype)
        view = wide[:, 8:-16].unflatten(1, values.shape[1:])
        view.copy_(values)
        return view
    if kind == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


@each_backend
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dim", [32, 192])
def test_record_queries(backend, dtype, kind, dim):
    generator = torch.Generator().manual_seed(0)
    query = strided(torch.randn(9, 6, dim, generator=generator).to(dtype), kind)
    index = torch.tensor([4, 11, 0, 11, 7, 2, 11, 1, 9, 3, 5])
    rows = torch.randn(12, 6, dim, generator=generator).to(dtype)
    wanted = rows.clone()
    device = on(backend.device, (query, index, rows.clone()))
    backend.module.record_queries(*device, None)
    torch_backend.record_queries(query, index, wanted, None)
    got = device[2].cpu()
    assert torch.equal(got[:-1], wanted[:-1])
    assert torch.equal(got[-1], rows[-1]), "nobody reads the last row, so writing it would be a waste"


NARROW = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@each_backend
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize(("scales", "dim"), [(1, 32), (2, 8), (6, 18), (3, 7)])
def test_record_queries_of_8_bits(backend, dtype, narrow, kind, scales, dim):
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(9 * 6 * dim).remainder(256).to(torch.uint8).view(9, 6, dim)
    query = strided(every.view(NARROW[narrow]), kind)
    scale = torch.rand(scales, generator=generator) * 3 + 0.01
    index = torch.tensor([4, 11, 0, 11, 7, 2, 11, 1, 9, 3, 5])
    rows = torch.randn(12, 6, dim, generator=generator).to(dtype)
    wanted = rows.clone()
    device = on(backend.device, (query, index, rows.clone(), scale))
    backend.module.record_queries(*device)
    torch_backend.record_queries(query, index, wanted, scale)
    # Triton's interpreter cuts bfloat16 off instead of rounding.
    rtol = 2**-7 if INTERPRETED and dtype is BF16 else 0
    torch.testing.assert_close(device[2].cpu()[:-1], wanted[:-1], rtol=rtol, atol=0, equal_nan=True)
    assert torch.equal(device[2].cpu()[-1], rows[-1])
    assert not torch.equal(wanted[4], rows[4])


@pytest.mark.parametrize(
    ("query", "scale", "message"),
    [
        (torch.zeros(2, 6, 8), torch.ones(1), "only they, have a scale"),
        (torch.zeros(2, 6, 8).to(torch.float8_e5m2), None, "only they, have a scale"),
        (torch.zeros(2, 6, 8).to(torch.float8_e5m2), torch.ones(4), "6 query heads do not share 4 scales"),
        (torch.zeros(2, 6, 8).to(torch.float8_e5m2), torch.ones(0), "6 query heads do not share 0 scales"),
        (torch.zeros(2, 6, 8).to(torch.float8_e5m2), torch.ones(1).double(), "scale must be float32"),
        (torch.zeros(2, 6, 8, dtype=torch.bfloat16), None, "ring must be"),
    ],
)
def test_bad_queries_are_refused(query, scale, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    with pytest.raises(RuntimeError, match=message):
        native.record_queries(query, torch.zeros(2, dtype=torch.int64), torch.zeros(3, 6, 8), scale)


@each_backend
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("width", [1, 48, 203])
def test_steer_add(backend, dtype, kind, width):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, width, generator=generator) * torch.logspace(-8, 6, 17)[:, None]
    hidden[3:5] = torch.tensor([[float("nan")], [-0.0]])
    hidden[6] = float("inf")
    row = torch.tensor([0, 1, 2, 0, 0, 1, 0, 2, 1, 1, 2, 2, 1, 0, 1, 2, 1, -99, -99], dtype=torch.int32)
    coefficient = torch.randn(19, generator=generator)
    vectors = torch.randn(3, width, generator=generator)
    vectors[0] = float("nan")
    arguments = (strided(hidden.to(dtype), kind), coefficient, row, vectors)
    got = backend.module.steer_add(*on(backend.device, arguments)).cpu()
    wanted = torch_backend.steer_add(*arguments)
    assert got.dtype is dtype
    bits = {FLOAT: torch.int32, BF16: torch.int16, HALF: torch.int16}[dtype]
    untouched = row[:17] == 0
    assert torch.equal(got[untouched].view(bits), arguments[0][untouched].contiguous().view(bits))
    if backend.name == "native" and backend.device == "cpu":
        assert torch.equal(got[~untouched], wanted[~untouched])
    else:
        torch.testing.assert_close(got[~untouched], wanted[~untouched])


def test_steer_add_of_every_half_and_bfloat16():
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    for dtype in (HALF, BF16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        # Adding nothing converts to float32 and back.
        numbers = torch.ones(256), torch.ones(256, dtype=torch.int32), torch.zeros(2, 256)
        got = native.steer_add(every.view(256, 256), *numbers).flatten()
        torch.testing.assert_close(got, every, rtol=0, atol=0, equal_nan=True)
        spread = torch.randn(64, 256) * torch.logspace(-9, 5.2, 64)[:, None]
        numbers = torch.ones(64), torch.ones(64, dtype=torch.int32), spread[:2].contiguous()
        zeros = torch.zeros(64, 256, dtype=dtype)
        for i in range(0, 64, 2):
            vectors = torch.cat([torch.zeros(1, 256), spread[i : i + 1]])
            got = native.steer_add(zeros, numbers[0], numbers[1], vectors)
            assert torch.equal(got[0], spread[i].to(dtype))


def test_no_tokens():
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    none = torch.zeros(0, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 8)
    assert native.steer_add(*none).shape == (0, 8)
    native.record_queries(torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(3, 2, 8), None)
