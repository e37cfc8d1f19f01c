"""Build the CUDA operators for the CPU: the same kernels, compiled by g++ and run by `cuda_emulator/emulator.cpp`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).with_name("cuda_emulator")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def cuda_headers() -> Path | None:
    """Find CUDA's own headers, which define float16 and bfloat16."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if compiler := shutil.which("nvcc"):
        homes.append(str(Path(compiler).resolve().parents[1]))
    found = (Path(home, "include") for home in homes if home)
    return next((folder for folder in found if (folder / "cuda_bf16.h").exists()), None)


def unavailable() -> str | None:
    """Return why the library cannot be built here, or None if it can."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    if cuda_headers() is None:
        return "CUDA's headers are missing; set CUDA_HOME"
    return None


def build(folder: Path, options: tuple[str, ...] = ()) -> Path:
    """Compile the library in an empty folder.

    Args:
        folder: for the sources and the objects.
        options: more options for g++, such as a sanitizer.

    Returns:
        Path of the library, which registers `torch.ops.skipkv_cuda`, for tensors on the CPU.
    """
    for source in (*(CSRC / "cuda").iterdir(), *EMULATOR.iterdir()):
        shutil.copy(source, folder)
    subprocess.run([sys.executable, str(CSRC / "generate.py"), str(folder / "operators.h")], check=True)
    library = folder / "emulated_cuda.so"
    torch_folder = Path(torch.__file__).parent
    # Threads of the emulator jump between stacks, which fortified code takes for a mistake.
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", "-U_FORTIFY_SOURCE", STABLE_ABI, *options]
    flags += ["-I", str(folder), "-I", str(CSRC), "-I", str(cuda_headers())]
    flags += ["-isystem", str(torch_folder / "include"), "-include", "cuda_runtime.h"]
    units = [file for file in folder.iterdir() if file.suffix in (".cu", ".cpp")]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-8000:]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: run(["g++", *flags, "-x", "c++", "-c", str(unit), "-o", f"{unit}.o"]), units))
    libraries = ["-L", str(torch_folder / "lib"), "-ltorch_cpu", "-ltorch", "-lc10"]
    run(["g++", "-shared", *options, *(f"{unit}.o" for unit in units), *libraries, "-o", str(library)])
    return library
