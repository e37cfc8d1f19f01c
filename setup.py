"""Build the operators in `csrc/`; pyproject.toml holds the metadata.

The libraries use PyTorch's stable ABI and no Python, so one build serves every Python and every PyTorch from 2.10 on.
The package also works without them, but slower, and logs a warning.

Environment:
    SKIPKV_BUILD_CPU=0: do not build the C++ operators.
    SKIPKV_BUILD_CUDA=1 or 0: build the CUDA operators or not; by default they are built where `nvcc` and a PyTorch for
        CUDA are installed.
    SKIPKV_CUDA_ARCHITECTURES=90a: build the CUDA operators for these architectures only (several with commas).
    SKIPKV_SANITIZE=1: build an instrumented C++ library instead, for `scripts/sanitize.sh`.
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
PER_ISA = (
    "central_tokens_row.cpp",
    "kernels.cpp",
    "measure_attention_row.cpp",
    "pool_neighbours_row.cpp",
    "score_tokens_row.cpp",
    "sentence_similarity_rows.cpp",
    "token_vectors.cpp",
    "vector_norms_row.cpp",
)
"""Sources that are compiled once per instruction set."""
UNFUSED = ("token_vectors.cpp",)
"""Those of them without fused multiply-adds: they round as PyTorch does."""
X86_ISAS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# A100, H100 with its own instructions, and PTX that newer GPUs translate at load time.
GENCODE = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


class Unit(NamedTuple):
    """A compiler call: its object file's name and its arguments."""

    name: str
    command: list[str]


def torch_folder() -> Path | None:
    """Find PyTorch's headers and libraries without importing it.

    pip builds in an isolated environment that hides the target environment's packages; its folder is still readable.
    """
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    candidate = Path(sysconfig.get_path("platlib"), "torch")
    return candidate if (candidate / "include").is_dir() else None


def torch_has_cuda(torch: Path) -> bool:
    return any((torch / "lib").glob("libtorch_cuda.*"))


def includes(torch: Path, headers: Path) -> list[str]:
    return ["-I", str(ROOT / "csrc"), "-I", str(headers), "-isystem", str(torch / "include")]


def cpu_units(torch: Path, compiler: str, headers: Path, sanitize: bool) -> list[Unit]:
    isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", STABLE_ABI]
    flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if sanitize else ["-O3"]
    flags += includes(torch, headers)
    units = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.name not in PER_ISA:
            units.append(Unit(source.stem, [compiler, *flags, "-c", str(source)]))
            continue
        contract = "off" if source.name in UNFUSED else "fast"
        for isa, options in isas.items():
            own = [f"-DSKIPKV_ISA={isa}", f"-ffp-contract={contract}", *options]
            units.append(Unit(f"{source.stem}_{isa}", [compiler, *flags, *own, "-c", str(source)]))
    return units


def cuda_units(torch: Path, compiler: str, headers: Path) -> list[Unit]:
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA"]
    flags += ["--expt-relaxed-constexpr", *includes(torch, headers)]
    flags += [part for each in gencode() for part in ("-gencode", each)]
    # A name without quotes or commas, which nvcc would take apart.
    flags.append("-DSKIPKV_IMAGES=" + "+".join(each.partition("code=")[2] for each in gencode()))
    return [
        Unit(source.stem, [compiler, *flags, "-c", str(source)])
        for source in sorted((ROOT / "csrc/cuda").glob("*"))
        if source.suffix in (".cu", ".cpp")
    ]


def gencode() -> tuple[str, ...]:
    """Return nvcc's names of the architectures to build for."""
    chosen = os.environ.get("SKIPKV_CUDA_ARCHITECTURES")
    return tuple(f"arch=compute_{a},code=sm_{a}" for a in chosen.split(",")) if chosen else GENCODE


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


def write_headers(folder: Path) -> Path:
    """Write the operators' declarations into a folder of their own."""
    headers = folder / "include"
    headers.mkdir(parents=True, exist_ok=True)
    call([sys.executable, str(ROOT / "csrc/generate.py"), str(headers / "operators.h")])
    return headers


def build(units: list[Unit], objects: Path, linker: str, libraries: list[str], output: Path) -> None:
    """Compile, then link. Libraries come after the objects; linkers would drop them otherwise.

    Raises:
        RuntimeError: a command failed; the message has its output.
    """
    objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    outputs = [str(objects / f"{unit.name}.o") for unit in units]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(call, [[*unit.command, "-o", out] for unit, out in zip(units, outputs, strict=True)]))
    # Replacing the file leaves the old library to processes that have loaded it.
    fresh = output.with_suffix(".new")
    call([linker, "-shared", *outputs, *libraries, "-o", str(fresh)])
    fresh.replace(output)


class BuildLibraries(build_ext):
    """Compile the libraries with the flags each source needs; leave out those that cannot be built."""

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
            # Remove a library of older sources, which would be taken for the current one.
            for stale in (output, ROOT / self.get_ext_filename(ext.name)):
                stale.unlink(missing_ok=True)
            return
        print(f"skipkv-vllm: built the {kind.upper()} operators: {output}")

    def _build(self, kind: str, output: Path) -> None:
        torch = torch_folder()
        if torch is None:
            raise RuntimeError("PyTorch is not installed in the build environment")
        library = ["-L", str(torch / "lib"), "-ltorch_cpu", "-ltorch", "-lc10"]
        objects = Path(self.build_temp) / kind
        headers = write_headers(objects)
        if kind == "cuda":
            compiler = nvcc()
            if compiler is None:
                raise RuntimeError("nvcc was not found")
            # A PyTorch without CUDA has no libtorch_cuda to link with; undefined symbols are resolved at load time.
            own = ["-ltorch_cuda"] if torch_has_cuda(torch) else []
            # Linkers drop libraries without referenced symbols, which libtorch is beside a CPU build. It must stay:
            # the current stream is found through it at load time.
            keep = ["-Xlinker", "--no-as-needed"]
            build(cuda_units(torch, compiler, headers), objects, compiler, [*keep, *library, *own], output)
            return
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("no C++ compiler was found")
        sanitize = kind == "sanitize"
        extra = ["-fsanitize=address,undefined"] if sanitize else ["-s"]
        build(cpu_units(torch, compiler, headers, sanitize), objects, compiler, [*library, *extra], output)


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
    """A wheel for every version of Python, as the libraries do not depend on it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def wanted() -> list[str]:
    """List the libraries to build."""
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
