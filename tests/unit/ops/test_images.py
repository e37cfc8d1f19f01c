"""The GPUs for which the CUDA library was built, and what is said on any other one; without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

from skipkv_vllm import KVPolicyError
from skipkv_vllm.cli import doctor
from skipkv_vllm.ops import dispatch, images, native

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("image", "runs", "fails"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 3)], [(12, 0)]),
    ],
)
def test_an_image_runs_on_its_gpus_only(image, runs, fails):
    assert all(images.runs_on(image, gpu) for gpu in runs)
    assert not any(images.runs_on(image, gpu) for gpu in fails)


def test_an_unknown_image_is_refused():
    with pytest.raises(ValueError, match="'ninety' is no image; expected a name such as sm_80"):
        images.runs_on("ninety", (9, 0))


@pytest.fixture
def built(monkeypatch) -> Iterator[Callable[[str, list[images.Capability]], None]]:
    """Pretend that the library was built for images, and that the machine has some GPUs."""

    def pretend(text: str, gpus: list[images.Capability]) -> None:
        real = native._cannot_load
        monkeypatch.setattr(native, "_cannot_load", lambda kind: None if kind == "cuda" else real(kind))
        monkeypatch.setattr(native, "built_for", lambda path: tuple(filter(None, text.split("+"))))
        monkeypatch.setattr(images, "capabilities", lambda: gpus)

    dispatch.choose.cache_clear()
    yield pretend
    dispatch.choose.cache_clear()


DEFAULT = "sm_80+sm_90a+compute_90"


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        (DEFAULT, [(8, 0)]),
        (DEFAULT, [(8, 9)]),
        (DEFAULT, [(12, 0)]),
        ("sm_90a", [(9, 0)]),
        # One of them is enough as long as nobody knows which one will be used.
        ("sm_90a", [(7, 5), (9, 0)]),
        # Without a driver, or with a library that does not tell, nothing is known.
        ("sm_90a", []),
        ("", [(7, 5)]),
    ],
)
def test_a_library_with_an_image_is_available(built, text, gpus):
    built(text, gpus)
    assert native.unavailable("cuda") is None


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        (
            "sm_90a",
            [(8, 0), (8, 0)],
            "_skipkv_cuda.so was built for sm_90a, and the GPU has compute capability 8.0; run "
            f"`SKIPKV_CUDA_ARCHITECTURES=80 SKIPKV_BUILD_CUDA=1 {native.REBUILD}` in a checkout, with a CUDA toolkit "
            "(nvcc)",
        ),
        (
            DEFAULT,
            [(7, 5)],
            "_skipkv_cuda.so was built for sm_80, sm_90a, compute_90, and the GPU has compute capability 7.5; it needs "
            "8.0 or newer, so leave SKIPKV_OPS unset for Triton's operators",
        ),
    ],
)
def test_a_library_without_an_image_is_not_used(built, monkeypatch, text, gpus, expected):
    monkeypatch.delenv(native.OVERRIDES["cuda"], raising=False)
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    built(text, gpus)
    assert native.unavailable("cuda") == expected
    choice = dispatch.choose("score_tokens", "cuda")
    assert choice.backend != "native"
    assert f"native: {expected}" in choice.missed
    with pytest.raises(KVPolicyError, match=r"cannot run on cuda: _skipkv_cuda\.so was built for"):
        native.operator("score_tokens", "cuda")


def test_doctor_says_why_the_library_is_not_used(built, monkeypatch):
    """Triton's operators are no problem, but slower, so the reason and the remedy are worth a line."""
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built("sm_90a", [(8, 0)])
    lines = doctor.examine().lines
    on_cuda = lines[lines.index("operators on cuda") :]
    assert "  score_tokens        triton" in on_cuda
    (said,) = (line for line in on_cuda if line.startswith("  not used: native: "))
    assert "was built for sm_90a, and the GPU has compute capability 8.0; run `SKIPKV_CUDA_ARCHITECTURES=80" in said


def test_the_answer_follows_the_gpu_of_the_process(built, monkeypatch):
    """A parent sees all GPUs before CUDA starts, and a worker only its own."""
    built("sm_90a", [(9, 0), (7, 5)])
    assert native.unavailable("cuda") is None
    monkeypatch.setattr(images, "capabilities", lambda: [(7, 5)])
    assert "7.5" in str(native.unavailable("cuda"))


class Driver:
    """A management library with GPUs; the second one cannot be opened."""

    GPUS = ((8, 0), None, (9, 0))

    def __init__(self, starts: bool = True) -> None:
        self._starts, self.said = starts, list[str]()
        self._functions: dict[str, Callable[..., int]] = {
            "nvmlInit_v2": self._start,
            "nvmlShutdown": lambda: 0,
            "nvmlDeviceGetCount_v2": self._count,
            "nvmlDeviceGetHandleByIndex_v2": self._open,
            "nvmlDeviceGetCudaComputeCapability": self._capability,
        }

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.said.append(name)
            return self._functions[name](*arguments)

        return call

    def _start(self) -> int:
        return 0 if self._starts else 9

    def _count(self, count: Any) -> int:
        count._obj.value = len(self.GPUS)
        return 0

    def _open(self, number: Any, device: Any) -> int:
        device._obj.value = number.value + 1
        return 0 if self.GPUS[number.value] else 4

    def _capability(self, device: Any, major: Any, minor: Any) -> int:
        assert isinstance(device, ctypes.c_void_p)
        found = self.GPUS[device.value - 1]
        assert found is not None
        major._obj.value, minor._obj.value = found
        return 0


def starting(*_: object) -> None:
    raise AssertionError("this would start CUDA, and a forked worker could not use it")


def test_the_driver_is_asked_without_starting_cuda(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(images.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("init", "_lazy_init", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, starting)
    assert images.capabilities() == [(8, 0), (9, 0)]
    assert (driver.said[0], driver.said[-1]) == ("nvmlInit_v2", "nvmlShutdown")


def test_a_machine_without_a_driver_has_no_known_gpus(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(images.ctypes, "CDLL", missing)
    assert images.capabilities() == []
    monkeypatch.setattr(images.ctypes, "CDLL", lambda name: Driver(starts=False))
    assert images.capabilities() == []


def test_where_cuda_has_started_the_current_gpu_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert images.capabilities() == [(8, 6)]


# ---- what is compiled into the library


@pytest.fixture
def setup_script(monkeypatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, ("sm_80", "sm_90a", "compute_90")), ("90a", ("sm_90a",)), ("80,86", ("sm_80", "sm_86"))],
)
def test_the_library_tells_what_it_was_built_for(setup_script, monkeypatch, tmp_path, chosen, expected):
    """Compile the part of its source that says so, with the flags of the build."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    monkeypatch.delenv("SKIPKV_CUDA_ARCHITECTURES", raising=False)
    if chosen:
        monkeypatch.setenv("SKIPKV_CUDA_ARCHITECTURES", chosen)
    (unit,) = (each for each in setup_script.cuda_units(tmp_path, "nvcc", tmp_path) if each.name == "library")
    flags = [each for each in unit.command if each.startswith("-DSKIPKV_IMAGES")]
    source = (ROOT / "csrc/cuda/library.cpp").read_text()
    part = source[source.index("#define SKIPKV_TEXT") : source.index("STABLE_TORCH_LIBRARY(")]
    (tmp_path / "part.cpp").write_text(part)
    library = tmp_path / "part.so"
    options = ["-shared", "-fPIC", "-fvisibility=hidden", "-Werror"]
    subprocess.run(["g++", *options, *flags, str(tmp_path / "part.cpp"), "-o", str(library)], check=True)
    assert images.images_of(str(library)) == expected


def test_a_library_that_does_not_tell_has_no_images(tmp_path):
    assert images.images_of(str(tmp_path / "nowhere.so")) is None
    if (cpu := native.path_of("cpu")).exists():
        assert images.images_of(str(cpu)) is None


# ---- loading on first use


def test_an_operator_loads_its_library():
    """Whoever calls the first operator of a process need not have asked whether there is one."""
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    for call in ("operator('score_tokens', 'cpu')", "limit_isa(2)", "score_scratch(64, 64, 8, 2)"):
        code = f"from skipkv_vllm.ops import native; native.{call}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_an_operator_of_a_missing_library_says_so(monkeypatch):
    monkeypatch.setattr(native, "_cannot_load", lambda device_type: "_skipkv_cpu.so was not built; build it")
    with pytest.raises(KVPolicyError, match=r"cannot run on cpu: _skipkv_cpu\.so was not built; build it"):
        native.operator("score_tokens", "cpu")
