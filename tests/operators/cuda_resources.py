"""What the CUDA kernels use, by ptxas: registers of a thread, its stack and spilled bytes, shared bytes of a block.

    python -m tests.operators.cuda_resources [--write]

compiles every kernel for every architecture in a few minutes, without a GPU, and compares with
`csrc/cuda/resources.tsv` or writes it anew. `make cuda-resources` does the same, with WRITE=1 or without.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from tests.operators.emulated_cuda import CSRC, STABLE_ABI

TABLE = CSRC / "cuda" / "resources.tsv"
ARCHITECTURES = ("sm_80", "sm_90a")
UNITS = tuple(sorted(path.name for path in (CSRC / "cuda").glob("*.cu")))

FOR_A_BLOCK = "ptxas spills a little itself to get by with as many registers as let another block run beside"
SPILLS = {
    "choose_central": FOR_A_BLOCK,
    "measure": FOR_A_BLOCK,
    "attend_queries": FOR_A_BLOCK,
    "sum_queries": FOR_A_BLOCK,
    "find_similar": FOR_A_BLOCK,
    "attend_heads": "with heads of 256 the outputs and their operands take all 255 registers of a thread",
    "find_similar_float": FOR_A_BLOCK,
}
"""Kernels whose threads may spill registers, and why. Every other one must not."""
SLOW = (
    *("attention_queries.cu", "attention_tokens.cu", "central_tokens.cu", "score_keys.cu", "score_similar.cu"),
    "vector_norms.cu",
)
"""Units that take long to compile, so that tests leave them to `make cuda-resources`."""


class Used(NamedTuple):
    """Registers, and bytes of stack, spilled (stored and loaded) and of static shared memory."""

    registers: int
    stack: int
    spilled: int
    shared: int


Table = dict[tuple[str, str, str], Used]
"""Unit, architecture and kernel -> what it uses."""

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?(?P<stack>\d+) bytes stack frame, (?P<stored>\d+) bytes spill "
    r"stores, (?P<loaded>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def unavailable() -> str | None:
    """Return why nothing can be compiled here, or None."""
    missing = [tool for tool in ("nvcc", "c++filt") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def nvcc_version() -> str:
    """Return nvcc's version, such as 13.0.88."""
    printed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    (version,) = re.findall(r"\bV([\d.]+)", printed)
    return version


def compiled(unit: str, architecture: str) -> Table:
    """Compile the kernels of a unit as `setup.py` does, and read what ptxas prints."""
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder, "operators.h")
        subprocess.run([sys.executable, str(CSRC / "generate.py"), str(header)], check=True)
        command = ["nvcc", "-std=c++17", "-O3", STABLE_ABI, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
        command += ["-I", str(CSRC), "-I", folder, "-isystem", str(Path(torch.__file__).parent / "include")]
        command += ["-cubin", f"-arch={architecture}", str(CSRC / "cuda" / unit), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return {(unit, architecture, _short(found["name"])): _used(found) for found in _ENTRY.finditer(done.stderr)}


def _used(found: re.Match[str]) -> Used:
    shared = re.search(r"(\d+) bytes smem", found["rest"])
    spilled = int(found["stored"]) + int(found["loaded"])
    return Used(int(found["registers"]), int(found["stack"]), spilled, int(shared[1]) if shared else 0)


def _short(mangled: str) -> str:
    """Return a kernel's name and template arguments."""
    whole = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |skipkv::|\(anonymous namespace\)::", "", whole).partition("(")[0]


def read() -> tuple[str, Table]:
    """Return nvcc's version and the numbers of the recorded table."""
    lines = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    (version,), *rows = lines
    return version, {(unit, arch, kernel): Used(*map(int, numbers)) for unit, arch, kernel, *numbers in rows}


def write(table: Table) -> None:
    """Record a table."""
    rows = ["\t".join([*key, *map(str, used)]) for key, used in sorted(table.items())]
    head = "# nvcc's version; then unit, architecture, kernel, registers, bytes of stack, spilled, of shared memory."
    how = "# Written by `python -m tests.operators.cuda_resources --write`."
    TABLE.write_text("\n".join([head, how, nvcc_version(), *rows, ""]), encoding="utf-8")


def complaints(found: Table, recorded: Table) -> list[str]:
    """Return what is worse than recorded, or unknown, and spills without a reason."""
    said = [f"{key} is not recorded" for key in found.keys() - recorded.keys()]
    for key, used in found.items():
        before = recorded.get(key, used)
        said += [
            f"{key}: {name} {now}, recorded {then}"
            for name, now, then in zip(Used._fields, used, before, strict=True)
            if now > then
        ]
        if used.spilled > 0 and key[2].partition("<")[0] not in SPILLS:
            said.append(f"{key} spills {used.spilled} bytes without a reason in SPILLS")
    return said


def main() -> None:
    """Compile all; compare with the table or write it."""
    pairs = [(unit, architecture) for unit in UNITS for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda pair: compiled(*pair), pairs))
    table = {key: used for part in parts for key, used in part.items()}
    if "--write" in sys.argv:
        write(table)
        said = complaints(table, table)
    else:
        version, recorded = read()
        if version != nvcc_version():
            sys.exit(f"the table is of nvcc {version}, this is {nvcc_version()}")
        said = complaints(table, recorded) + [f"{key} is gone" for key in recorded.keys() - table.keys()]
    if said:
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
