"""The CUDA kernels use no more registers, stack and shared memory than recorded, and spill only for a known reason.

Units that compile quickly, for one architecture; `make cuda-resources` checks all.
"""

from __future__ import annotations

import re

import pytest

from tests.operators import cuda_resources
from tests.operators.cuda_resources import ARCHITECTURES, SLOW, SPILLS, TABLE, UNITS, Used

VERSION, RECORDED = cuda_resources.read()
WITH_KERNELS = [unit for unit in UNITS if "__global__" in (TABLE.parent / unit).read_text(encoding="utf-8")]


@pytest.mark.parametrize("unit", [unit for unit in WITH_KERNELS if unit not in SLOW])
def test_kernels_use_no_more_than_recorded(unit):
    if why := cuda_resources.unavailable():
        pytest.skip(why)
    if (version := cuda_resources.nvcc_version()) != VERSION:
        pytest.skip(f"the table is of nvcc {VERSION}, this is {version}")
    found = cuda_resources.compiled(unit, ARCHITECTURES[0])
    assert found
    assert cuda_resources.complaints(found, RECORDED) == [], "if this is meant: make cuda-resources WRITE=1"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_unit_is_recorded(architecture):
    assert sorted({unit for unit, each, _ in RECORDED if each == architecture}) == WITH_KERNELS


def test_blocks_request_dynamic_shared_memory_in_time():
    """Without a request a block gets at most 48 KiB, with what its kernel declares."""
    launching = (TABLE.parent / "launch.cuh").read_text(encoding="utf-8")
    (kibibytes,) = re.findall(r"kUnrequested = (\d+) \* 1024;", launching)
    dynamic = [unit for unit in WITH_KERNELS if "dynamic_shared()" in (TABLE.parent / unit).read_text(encoding="utf-8")]
    assert dynamic
    declared = max(used.shared for (unit, _, _), used in RECORDED.items() if unit in dynamic)
    assert (int(kibibytes) << 10) + declared <= 48 << 10


def test_recorded_spills_have_reasons():
    assert cuda_resources.complaints(RECORDED, RECORDED) == []


def test_worse_kernels_are_noticed():
    key = ("tokens.cu", "sm_80", "copy_queries<uint4>")
    recorded = {key: Used(26, 0, 0, 0)}
    assert cuda_resources.complaints({key: Used(20, 0, 0, 0)}, recorded) == []
    for worse in (Used(27, 0, 0, 0), Used(26, 8, 0, 0), Used(26, 0, 0, 16)):
        assert len(cuda_resources.complaints({key: worse}, recorded)) == 1
    assert len(cuda_resources.complaints({key: Used(26, 0, 4, 0)}, recorded)) == 2
    assert len(cuda_resources.complaints({key: Used(26, 0, 4, 0)}, {})) == 2
    assert "tokens" not in SPILLS


def test_what_ptxas_prints_is_read():
    """Lines of nvcc 13."""
    name = "_ZN6skipkv12_GLOBAL__N_112copy_queriesIhEEvi"
    printed = f"""ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    8 bytes stack frame, 4 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size, 1344 bytes smem, 528 bytes cmem[0]
"""
    (found,) = cuda_resources._ENTRY.finditer(printed)
    assert cuda_resources._used(found) == Used(96, 8, 28, 1344)
    if cuda_resources.unavailable() is None:
        assert cuda_resources._short(found["name"]) == "copy_queries<unsigned char>"
