"""Count the instructions in the main loops of CUDA kernels, without a GPU: `python -m benchmarks.kernels.instructions`.

    python -m benchmarks.kernels.instructions --source score_similar
    python -m benchmarks.kernels.instructions --source score_similar --csrc OTHER_CHECKOUT/csrc

Needs nvcc, and cuobjdump or Triton, which brings one. A kernel's main loop is the shortest one with all its kinds of
products. If warps vote in it whether a rare case occurred, the count ends there.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COUNTED = ("HMMA", "FFMA", "LDSM", "LDS", "LDGSTS", "LDG", "LDL", "STL")
"""Products of tensor cores and others; loads of matrices and others from shared memory; copies from global to shared
memory and loads; loads and stores of spilled registers."""


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: with its template arguments.
        registers: of a thread.
        spilled: bytes of a thread's spilled stores and loads.
        loop: instructions of the main loop by kind; see the module.
    """

    name: str
    registers: int
    spilled: int
    loop: Counter[str]


class Instruction(NamedTuple):
    """An instruction: its address, its name, and where it jumps to, if it does."""

    address: int
    name: str
    target: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="score_similar", help="a file of csrc/cuda, without .cu")
    parser.add_argument("--kernels", default="__nv_bfloat16, 8", metavar="PATTERN", help="which kernels")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90a"])
    args = parser.parse_args(arguments)
    print(f"| kernel | architecture | registers | spilled, bytes | instructions | {' | '.join(COUNTED)} |")
    print("| --- " * (5 + len(COUNTED)) + "|")
    for architecture in args.architectures:
        for kernel in compiled(args.csrc, args.source, architecture):
            if not re.search(args.kernels, kernel.name):
                continue
            counts = " | ".join(str(kernel.loop[name]) for name in COUNTED)
            sizes = f"{kernel.registers} | {kernel.spilled} | {kernel.loop.total()}"
            print(f"| `{kernel.name}` | {architecture} | {sizes} | {counts} |")
    return 0


def compiled(csrc: Path, source: str, architecture: str) -> Iterator[Kernel]:
    """Compile a source file and yield its kernels.

    Raises:
        RuntimeError: a tool is missing or failed.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("PyTorch is not installed")
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, str(csrc / "generate.py"), f"{folder}/operators.h"])
        flags = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, "--expt-relaxed-constexpr", f"-arch={architecture}"]
        flags += ["-I", str(csrc), "-I", folder, "-isystem", str(Path(torch.origin).parent / "include")]
        cubin = f"{folder}/kernels.cubin"
        log = _run(["nvcc", *flags, "-cubin", "-Xptxas", "-v", str(csrc / "cuda" / f"{source}.cu"), "-o", cubin])
        code = _run([_cuobjdump(), "-sass", cubin])
    sizes = dict(_sizes(log.splitlines()))
    names = _run(["c++filt"], "\n".join(sizes)).splitlines()
    for (mangled, size), name in zip(sizes.items(), names, strict=True):
        loop = main_loop(list(_instructions(code, mangled)))
        yield Kernel(re.sub(r"\(anonymous namespace\)::|^void |\(skipkv::\w+\)$|skipkv::", "", name), *size, loop)


def _run(command: list[str], given: str | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} was not found")
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def _cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        return str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    raise RuntimeError("cuobjdump was not found")


def _sizes(log: Iterable[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Read registers and spilled bytes of each kernel from the assembler's log."""
    name, spilled = "", 0
    for line in log:
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name, spilled = found[1], 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # The first such line is the kernel's, others are of functions that it calls.
            spilled = spilled or int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            yield name, (int(found[1]), spilled)


def _instructions(code: str, kernel: str) -> Iterator[Instruction]:
    """Read the instructions of a kernel, without those that do nothing."""
    inside = False
    for line in code.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            inside = found[1] == kernel
        elif inside and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+ )?\s*([\w.]+)(.*);", line)):
            if found[2] == "@!PT ":
                continue
            jump = re.search(r"0x([0-9a-f]+)", found[4]) if found[3].startswith("BRA") else None
            yield Instruction(int(found[1], 16), found[3], int(jump[1], 16) if jump else None)


def main_loop(code: Sequence[Instruction]) -> Counter[str]:
    """Count the instructions of the main loop by their first names; see the module."""
    kind = "HMMA" if any(each.name.startswith("HMMA") for each in code) else "FFMA"
    products = [each.address for each in code if each.name.startswith(kind)]
    loops = [(each.target, each.address) for each in code if each.target is not None and each.target < each.address]
    most = max((sum(a <= p <= b for p in products) for a, b in loops), default=0)
    if most == 0:
        return Counter()
    whole = [(a, b) for a, b in loops if sum(a <= p <= b for p in products) == most]
    begin, end = min(whole, key=lambda loop: loop[1] - loop[0])
    last = max(p for p in products if p <= end)
    votes = [each.address for each in code if each.name.startswith("VOTE") and last < each.address < end]
    end = min(votes, default=end)
    return Counter(each.name.split(".")[0] for each in code if begin <= each.address <= end)


if __name__ == "__main__":
    sys.exit(main())
