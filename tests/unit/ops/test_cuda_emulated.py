"""The CUDA kernels without a GPU: compiled for the CPU, every case of the parity tests, against `torch_backend`.

This finds wrong indices, barriers and arithmetic. It cannot find errors of the hardware: limits of shared memory,
the layout of tensor-core operands, and races between threads of a warp. `tests/gpu` is for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernels import memory
from skipkv_vllm.ops import Effect, native, torch_backend
from skipkv_vllm.ops.paging import Layout
from skipkv_vllm.ops.schema import NATIVE
from tests.operators import emulated_cuda
from tests.operators.cases import CompactCase, MeasureCase, Pages, ScoreCase
from tests.operators.measured_cases import CentralCase
from tests.operators.thought_cases import check_thoughts
from tests.operators.tracking_cases import check_tracking
from tests.unit.ops import test_parity_attention as attention
from tests.unit.ops import test_parity_measured as measured
from tests.unit.ops import test_parity_scores as scores
from tests.unit.ops import test_parity_selection as selection
from tests.unit.ops import test_parity_sentences as sentences
from tests.unit.ops import test_parity_tokens as tokens

if why := emulated_cuda.unavailable():
    pytest.skip(f"cannot build the CUDA kernels for the CPU: {why}", allow_module_level=True)
if native.unavailable("cuda") is None:
    pytest.skip("the CUDA operators themselves can be loaded; test_parity.py tests them", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The emulated kernels as a backend of the parity tests."""
    torch.ops.load_library(emulated_cuda.build(tmp_path_factory.mktemp("emulated_cuda")))
    return SimpleNamespace(name="native", device="cpu", module=torch.ops.skipkv_cuda, tolerance=1e-5)


def rows(cases: dict[str, Any], *layouts: Layout) -> Any:
    """Parametrise with the cases whose page layouts the kernels read; those of `layouts` beside K and V together."""
    fit = {k: v for k, v in cases.items() if not hasattr(v, "pages") or v.pages.layout in (Layout.ROWS, *layouts)}
    return pytest.mark.parametrize("case", list(fit.values()), ids=[name.replace(" ", "-") for name in fit])


@rows(scores.SCORES)
def test_score_tokens(cuda, case):
    scores.check_score_case(cuda, case)


@rows(scores.BYTES_OF)
def test_every_number_of_8_bits_is_read_as_it_is(cuda, case):
    scores.check_every_byte(cuda, case)


@pytest.mark.parametrize("dtype", FP8)
def test_no_number_is_read_as_none(cuda, dtype):
    scores.test_no_number_is_read_as_none(cuda, dtype)


def test_queries_for_keys_of_8_bits_are_float32(cuda):
    scores.test_queries_for_keys_of_8_bits_are_float32(cuda)


@pytest.mark.parametrize("dtype", [*DTYPES, *FP8])
@pytest.mark.parametrize("dim", [8, 32, 36, 64, 72, 80, 96, 112, 128, 192, 256])
def test_scores_of_every_head_size(cuda, dtype, dim):
    case = ScoreCase(Pages(dtype=dtype, dim=dim, layers=1), (150, 65), window=11, keys="clusters", threshold=0.7)
    scores.check_score_case(cuda, case)


@pytest.mark.parametrize("effect", Effect, ids=lambda effect: effect.name.lower())
@rows(attention.MEASURES)
def test_measure_attention(cuda, case, effect):
    attention.check_measure_case(cuda, case, effect)


@rows(attention.MEASURES)
def test_key_similarity(cuda, case):
    attention.check_similarity_case(cuda, case)


@pytest.mark.parametrize("dtype", [*DTYPES, *FP8])
@pytest.mark.parametrize("dim", [8, 36, 72, 112, 136, 256])
def test_attention_of_every_head_size(cuda, dtype, dim):
    case = MeasureCase(Pages(dtype=dtype, dim=dim, layers=1), (150, 65), (11, 7), window=11, group=3)
    attention.check_measure_case(cuda, case, Effect.JOINT)
    attention.check_similarity_case(cuda, case)


@rows(measured.NORMS)
def test_vector_norms(cuda, case):
    measured.check_norms_case(cuda, case)


@rows(measured.POOLS)
def test_pool_neighbours(cuda, case):
    measured.check_pool_case(cuda, case)


@rows(measured.CENTRAL)
def test_central_tokens(cuda, case):
    measured.check_central_case(cuda, case)


@pytest.mark.parametrize("dtype", [*DTYPES, *FP8])
@pytest.mark.parametrize("dim", [8, 36, 136, 256])
def test_centres_of_every_head_size(cuda, dtype, dim):
    measured.check_central_case(cuda, CentralCase(Pages(dtype=dtype, dim=dim, layers=1, heads=1)))


@rows(selection.SELECTIONS)
def test_select_keep(cuda, case):
    arguments = case.build()
    selection.check_selection(cuda.module.select_keep(*arguments), arguments)


@rows(selection.COMPACTIONS, Layout.LATENT)
@pytest.mark.parametrize("seed", [0, 1])
def test_compact_pages(cuda, case, seed):
    wanted = replace(case, seed=seed).build()
    got = wanted.copy()
    cuda.module.compact_pages(*got)
    torch_backend.compact_pages(*wanted)
    selection.check_compaction(got, wanted)


@pytest.mark.parametrize("seed", range(30))
def test_track_sentences(cuda, seed):
    check_tracking(cuda.module, seed)


@pytest.mark.parametrize("seed", range(30))
def test_track_thoughts(cuda, seed):
    check_thoughts(cuda.module, seed)


@rows(sentences.SENTENCES)
def test_sentence_similarity(cuda, case):
    sentences.test_sentence_similarity(cuda, case)


@rows(sentences.HELD)
def test_held_positions(cuda, case):
    sentences.test_held_positions(cuda, case)


@pytest.mark.parametrize("seed", range(6))
def test_token_penalties(cuda, seed):
    sentences.test_token_penalties(cuda, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tokens.STRIDES)
def test_tokens(cuda, dtype, kind):
    for dim in (32, 192):
        tokens.test_record_queries(cuda, dtype, kind, dim)
    for width in (1, 48, 203):
        tokens.test_steer_add(cuda, dtype, kind, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", tokens.NARROW)
@pytest.mark.parametrize("kind", tokens.STRIDES)
def test_queries_of_8_bits(cuda, dtype, narrow, kind):
    for scales, dim in ((1, 32), (2, 8), (6, 18), (3, 7)):
        tokens.test_record_queries_of_8_bits(cuda, dtype, narrow, kind, scales, dim)


def allocated_by(call: Callable[..., Any], *arguments: Any) -> int:
    """Return the bytes of all tensors that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call(*arguments)
    del kept
    return sum(event.self_cpu_memory_usage for event in seen.events() if "empty" in event.name)


@pytest.mark.parametrize("lengths", [(150,), (70, 40, 96)])
@pytest.mark.parametrize("dim", [64, 256])
def test_memory_is_as_the_formulas_of_the_benchmark_say(cuda, lengths, dim):
    pages = Pages(dtype=torch.bfloat16, dim=dim)
    scoring = ScoreCase(pages, lengths, group=4, window=11).build()
    call = memory.Call(len(lengths) * 2 * 2, scoring.positions.shape[-1], dim, 11, 4)
    assert allocated_by(cuda.module.score_tokens, *scoring) == memory.scoring_bytes("native", call)

    measuring = MeasureCase(pages, lengths, tuple(9 for _ in lengths), window=11, group=4).build()
    for effect in (Effect.ATTENTION, Effect.OUTPUT):
        allocated = allocated_by(cuda.module.measure_attention, *measuring, effect, 0.0)
        assert allocated == memory.measuring_bytes(call, effect is Effect.OUTPUT)


@pytest.mark.parametrize(
    ("sizes", "strides", "unit"),
    [
        ((9, 2, 16, 128), (4096, 2048, 128, 1), 16),
        ((9, 2, 16, 128), (4100, 2048, 128, 1), 8),
        ((9, 2, 16, 128), (4097, 2048, 128, 1), 2),
        # A single page, head or token has no next one, so its stride may be any number.
        ((9, 1, 16, 128), (2048, 7, 128, 1), 16),
        ((9, 2, 1, 128), (256, 128, 3, 1), 16),
        ((1, 1, 1, 128), (5, 7, 3, 1), 16),
    ],
)
def test_cells_are_copied_in_the_widest_unit(cuda, sizes, strides, unit):
    caches = [torch.zeros(40000, dtype=torch.bfloat16).as_strided(sizes, strides) for _ in range(2)]
    pointers = torch.tensor([cache.data_ptr() for cache in caches])
    assert torch.ops.skipkv_cuda_probe.cell_unit(caches, pointers) == unit


@pytest.mark.parametrize("layout", [Layout.VEC, Layout.AMX])
def test_layouts_of_cpus_are_refused(cuda, layout):
    pages = Pages(layout, torch.bfloat16, size=32)
    with pytest.raises(RuntimeError, match="layout must be 0"):
        cuda.module.score_tokens(*ScoreCase(pages).build())
    with pytest.raises(RuntimeError, match="layout must be 0"):
        cuda.module.compact_pages(*CompactCase(pages).build())


def test_latents_are_read_by_the_operators_that_say_so(cuda):
    pages = Pages(Layout.LATENT, torch.bfloat16, heads=1, dim=576)
    assert native.lacks("compact_pages", "cuda", Layout.LATENT) is None
    assert native.lacks("score_tokens", "cuda", Layout.LATENT) is not None
    with pytest.raises(RuntimeError, match="layout must be 0"):
        cuda.module.score_tokens(*ScoreCase(pages).build())


def test_the_library_has_the_schemas(cuda):
    for op in NATIVE:
        registered = str(getattr(cuda.module, op).default._schema)
        wanted = str(getattr(torch.ops.skipkv, op).default._schema)
        assert registered == wanted.replace("skipkv::", "skipkv_cuda::")
