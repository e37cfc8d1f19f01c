"""Build script for the operators in `csrc/`; the metadata stands in pyproject.toml.

Libraries use PyTorch's stable ABI and no Python, so that one build serves every Python and every PyTorch from 2.10 on.
Where they cannot be built the package works without them, slower, and says so.

Environment:
    SKIPKV_BUILD_CPU=0: leave the C++ operators out.
    SKIPKV_BUILD_CUDA=1 or 0: build the CUDA operators, or leave them out; by default they are built where `nvcc` and
        a PyTorch for CUDA are.
    SKIPKV_SANITIZE=1: an instrumented C++ library beside the normal one; `scripts/sanitize.sh` uses it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10
PER_ISA = ("attention.cpp", "score.cpp", "similar.cpp", "steer.cpp")
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# A100, H100 with its own instructions, and PTX that newer ones translate when they load it.
GENCODE = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


class Unit(NamedTuple):
    """A compiler call: its object file's name and its arguments."""

    name: str
    command: list[str]


def torch_folder() -> Path | None:
    """Where PyTorch is, without importing it: its headers and libraries are all that is needed.

    pip builds in an environment of its own, which hides the one it installs into; its folder can be looked at even so.
    """
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    candidate = Path(sysconfig.get_path("platlib"), "torch")
    return candidate if (candidate / "include").is_dir() else None


def torch_has_cuda(torch: Path) -> bool:
    return any((torch / "lib").glob("libtorch_cuda.*"))


def cpu_units(torch: Path, compiler: str, sanitize: bool) -> list[Unit]:
    isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", STABLE_ABI]
    flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if sanitize else ["-O3"]
    flags += ["-isystem", str(torch / "include")]
    units = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.name not in PER_ISA:
            units.append(Unit(source.stem, [compiler, *flags, "-c", str(source)]))
            continue
        contract = "off" if source.name == "steer.cpp" else "fast"
        for isa, options in isas.items():
            own = [f"-DSKIPKV_ISA={isa}", f"-ffp-contract={contract}", *options]
            units.append(Unit(f"{source.stem}_{isa}", [compiler, *flags, *own, "-c", str(source)]))
    return units


def cuda_units(torch: Path, compiler: str) -> list[Unit]:
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA"]
    flags += ["--expt-relaxed-constexpr", "-isystem", str(torch / "include")]
    flags += [part for each in GENCODE for part in ("-gencode", each)]
    return [
        Unit(source.stem, [compiler, *flags, "-c", str(source)])
        for source in sorted((ROOT / "csrc/cuda").glob("*"))
        if source.suffix in (".cu", ".cpp")
    ]


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


def build(units: list[Unit], objects: Path, linker: str, libraries: list[str], output: Path) -> None:
    """Compile, then link; libraries come after the objects, or linkers drop them.

    Raises:
        RuntimeError: the compiler's complaint.
    """
    objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    outputs = [str(objects / f"{unit.name}.o") for unit in units]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(call, [[*unit.command, "-o", out] for unit, out in zip(units, outputs, strict=True)]))
    # A process that has the old library open keeps it.
    fresh = output.with_suffix(".new")
    call([linker, "-shared", *outputs, *libraries, "-o", str(fresh)])
    fresh.replace(output)


class BuildLibraries(build_ext):
    """Compiles the libraries with the flags each source needs, and goes on without those that cannot be built."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        kind = ext.name.rpartition("_")[2]
        try:
            self._build(kind, output)
        except (RuntimeError, OSError) as error:
            print(
                f"\n*** WARNING: skipkv-vllm: the {kind.upper()} operators were NOT built: {error}\n"
                f"*** The package works without them, but slower. {REMEDY[kind]}\n",
                file=sys.stderr,
            )
            # A library of older sources would pass for the current one.
            for stale in (output, ROOT / self.get_ext_filename(ext.name)):
                stale.unlink(missing_ok=True)
            return
        print(f"skipkv-vllm: built the {kind.upper()} operators: {output}")

    def _build(self, kind: str, output: Path) -> None:
        torch = torch_folder()
        if torch is None:
            raise RuntimeError("PyTorch is not in the environment that builds")
        library = ["-L", str(torch / "lib"), "-ltorch_cpu", "-ltorch", "-lc10"]
        objects = Path(self.build_temp) / kind
        if kind == "cuda":
            compiler = nvcc()
            if compiler is None:
                raise RuntimeError("nvcc was not found")
            # A PyTorch without CUDA has no library to link with; what is left undefined is resolved when it is loaded.
            own = ["-ltorch_cuda"] if torch_has_cuda(torch) else []
            # Nothing of libtorch is referenced while linking beside a CPU build, and linkers drop what is not; the
            # current stream is found through it when the library is loaded.
            keep = ["-Xlinker", "--no-as-needed"]
            build(cuda_units(torch, compiler), objects, compiler, [*keep, *library, *own], output)
            return
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("no C++ compiler was found")
        sanitize = kind == "sanitize"
        extra = ["-fsanitize=address,undefined"] if sanitize else ["-s"]
        build(cpu_units(torch, compiler, sanitize), objects, compiler, [*library, *extra], output)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    own = Path(home, "bin", "nvcc") if home else None
    return str(own) if own and own.exists() else shutil.which("nvcc")


REMEDY = {
    "cpu": "Debian/Ubuntu: apt-get install g++, then `pip install --no-build-isolation -e .` where torch is installed.",
    "cuda": "Set CUDA_HOME to a CUDA toolkit, then SKIPKV_BUILD_CUDA=1 pip install --no-build-isolation -e .",
    "sanitize": "Use g++ with libasan and libubsan.",
}


class PlatformWheel(bdist_wheel):
    """Nothing in the libraries depends on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def wanted() -> list[str]:
    """Libraries to build."""
    if os.environ.get("SKIPKV_SANITIZE") == "1":
        return ["sanitize"]
    names = [] if os.environ.get("SKIPKV_BUILD_CPU") == "0" else ["cpu"]
    torch = torch_folder()
    choice = os.environ.get("SKIPKV_BUILD_CUDA")
    found = (
        nvcc() is not None
        and torch is not None
        and torch_has_cuda(torch)
        and bool(list((ROOT / "csrc/cuda").glob("*.cu")))
    )
    if choice == "1" or (choice is None and found):
        names.append("cuda")
    return names


setup(
    ext_modules=[Extension(f"skipkv_vllm.ops._skipkv_{name}", sources=[], optional=True) for name in wanted()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
