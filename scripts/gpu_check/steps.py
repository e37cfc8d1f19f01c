"""The steps of the check: what each one answers, how long it may take, what it runs and when it has passed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .commands import Command
from .environment import ROOT

MOST_IMPORTANT = (0, 2, 7, 8)

CPU_FACTOR = 12
"""On a CPU everything may take that many times as long."""

MISSED = "a bar was missed, or it could not run"

TIMINGS_LIMIT = 75
TIMINGS_WITHIN = 50
"""Seconds after which step 7 begins no further part; before them it must start, and after them end the last one."""

OPERATORS = "tests/gpu/test_ops_cuda.py"
TOKENS = ("tests/unit/ops/test_parity_tokens.py", "tests/unit/ops/test_parity_sentences.py")


@dataclass(frozen=True)
class Context:
    """Where the check runs.

    Attributes:
        device: "cuda" or "cpu".
        python: interpreter of the steps.
        folder: prepared files.
        scratch: files of the steps.
        is_tiny: whether few cases and small sizes are enough.
        architecture: of the GPU, as nvcc names it; empty without one.
    """

    device: str
    python: str
    folder: Path
    scratch: Path
    is_tiny: bool
    architecture: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"

    @property
    def built(self) -> Path:
        """Library that step 1 builds."""
        return self.scratch / "built/skipkv_vllm/ops" / f"_skipkv_{self.device}.so"

    def environment(self, uses_built: bool = False) -> dict[str, str]:
        """Return the variables of every command: where the libraries and the carried attention lie.

        Args:
            uses_built: whether the library of step 1 takes the place of the carried one.
        """
        found = {}
        if (self.folder / "attention").is_dir():
            found["SKIPKV_CARRIED_ATTENTION"] = str(self.folder / "attention")
        for kind in ("cpu", "cuda"):
            name = f"_skipkv_{kind}.so"
            carried = self.folder / "lib" / name
            if not (ROOT / "skipkv_vllm/ops" / name).is_file() and carried.is_file():
                found[f"SKIPKV_NATIVE_{kind.upper()}"] = str(carried)
        if uses_built:
            found[f"SKIPKV_NATIVE_{self.device.upper()}"] = str(self.built)
        if not self.on_gpu:
            found["SKIPKV_GPU_TESTS"] = "cpu"
        return found

    def module(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of a module of this package."""
        return [self.python, "-m", f"scripts.gpu_check.{name}", "--device", self.device, *arguments]


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        number: in the order in which they run.
        name: short.
        question: what it answers.
        limit: seconds on a GPU.
        commands: returns what to run, or why nothing can be run.
        misses: returns what the figures of the commands miss; empty if they are good enough. On a CPU it is not asked.
        in_background: whether the next steps start at once.
        needs_quiet: whether it judges times, so that steps in the background must have ended.
    """

    number: int
    name: str
    question: str
    limit: int
    commands: Callable[[Context], Sequence[Command] | str]
    misses: Callable[[dict[str, dict[str, Any]]], list[str]] = lambda figures: []
    in_background: bool = False
    needs_quiet: bool = False


def pytest(
    context: Context, name: str, files: Sequence[str], chosen: str, *, workers: int = 0, **environment: str
) -> Command:
    """Return a command that runs tests.

    Args:
        context: where.
        name: of the command.
        files: of the tests.
        chosen: pytest's expression for the tests to run.
        workers: processes; 0 for this one. On a CPU there is only one.
        **environment: further variables.
    """
    report = context.scratch / f"{name.replace(' ', '-')}.xml"
    arguments = [context.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", chosen]
    # The old format has properties of single tests.
    arguments += ["-o", "junit_family=xunit1", "--tb=short", *files]
    if workers and context.on_gpu:
        arguments += ["-p", "xdist.plugin", "-n", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal"]
    # The machine may have plugins that do not fit the carried pytest.
    return Command(name, arguments, {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, report)


def tool_of_cuda(name: str) -> str:
    """Return the path of a tool of the CUDA toolkit; its name if it is not found."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=str(folder)) or name


def parity_files() -> list[str]:
    """Return the files of the parity tests."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/unit/ops").glob("test_parity_*.py"))]


def _load(context: Context) -> Sequence[Command] | str:
    return [Command("load", context.module("load", "--out", "{figures}"))]


def _build(context: Context) -> Sequence[Command] | str:
    if not context.on_gpu and context.is_tiny:
        return "left out with --tiny: the C++ operators take a minute to compile; the CUDA ones need CUDA"
    kind = context.device
    variables = {"SKIPKV_BUILD_CPU": "0", "SKIPKV_BUILD_CUDA": "0"} | {f"SKIPKV_BUILD_{kind.upper()}": "1"}
    if context.on_gpu:
        variables["SKIPKV_CUDA_ARCHITECTURES"] = context.architecture
    # The other steps need cores too.
    variables["MAX_JOBS"] = str(max(1, (os.cpu_count() or 2) * 3 // 4))
    command = [context.python, "setup.py", "-q", "build_ext", "--build-lib", str(context.scratch / "built")]
    command += ["--build-temp", str(context.scratch / "objects")]
    loading = Command(
        "load what was built",
        context.module("load", "--out", "{figures}"),
        {f"SKIPKV_NATIVE_{kind.upper()}": str(context.built)},
    )
    return [Command("build", command, variables), loading]


def _native(context: Context) -> Sequence[Command] | str:
    chosen = "native"
    if not context.on_gpu:
        # On a CPU it takes minutes, and there is no scratch memory to run out of.
        chosen = "native and not scratch"
    if context.is_tiny:
        chosen = "native and (waits or (graph and bfloat16) or same_bits)"
    return [pytest(context, "operators native", [OPERATORS], chosen)]


def _parity(context: Context) -> Sequence[Command] | str:
    backend = "native-cuda" if context.on_gpu else "native-cpu and not isa"
    chosen = f"{backend} and (literal or window)" if context.is_tiny else backend
    return [pytest(context, "parity native", parity_files(), chosen, workers=4)]


def _sanitize(context: Context) -> Sequence[Command] | str:
    command = context.module("sanitized", "--out", "{figures}")
    if not context.on_gpu:
        return [Command("without sanitizer", command)]
    return [
        Command(
            tool,
            [tool_of_cuda("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", *command],
            # PyTorch's allocator would hide an access beyond the end of a tensor in its large blocks.
            # Loading all of PyTorch's kernels, and instrumenting them, would take minutes.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"},
            unavailable="Device not supported",
            meanings={9: f"{tool} found errors"},
            joins=tool != "memcheck",
        )
        for tool in ("memcheck", "racecheck")
    ]


def _triton(context: Context) -> Sequence[Command] | str:
    if context.on_gpu:
        chosen = "triton and not (long and float32)"
        return [pytest(context, "triton", [OPERATORS, *parity_files()], chosen, workers=12)]
    chosen = "triton-cpu and select" if context.is_tiny else "triton-cpu"
    return [pytest(context, "triton interpreted", parity_files(), chosen, TRITON_INTERPRET="1")]


def _first_compaction(context: Context) -> Sequence[Command] | str:
    found = []
    for backend in ("native", "triton"):
        for warms_up in (False, True):
            if context.is_tiny and (backend, warms_up) != ("native", True):
                continue
            name = f"first compaction {backend}{' after warm-up' if warms_up else ''}"
            variables = {
                "SKIPKV_OPS": backend,
                # A cache of its own, so that kernels are compiled.
                "TRITON_CACHE_DIR": tempfile.mkdtemp(dir=context.scratch, prefix="triton-"),
            }
            if backend == "triton" and not context.on_gpu:
                variables["TRITON_INTERPRET"] = "1"
            options = ["--warm-up"] if warms_up else []
            command = context.module("compaction", *options, "--out", "{figures}")
            # Triton compiles in both for long; nobody judges their times, so they may disturb each other.
            joins = backend == "triton" and warms_up
            found.append(Command(name, command, variables, joins=joins))
    return found


def _misses_of_first_compaction(figures: dict[str, dict[str, Any]]) -> list[str]:
    first = figures.get("first compaction native", {}).get("first_ms")
    return [] if first is None or first < 300 else [f"the first compaction took {first:.0f} ms, not below 300"]


def _engine(context: Context) -> Sequence[Command] | str:
    tests = [
        pytest(context, "attention", ["tests/gpu/test_paged_attention.py"], context.device),
        pytest(context, "small engine", ["tests/gpu/test_small_engine.py"], _of_engine(context)),
    ]
    if not context.on_gpu and (context.folder / "attention").is_dir():
        files = ["tests/gpu/test_paged_attention.py"]
        tests.append(pytest(context, "carried attention", files, "triton", TRITON_INTERPRET="1"))
    return tests


def _of_engine(context: Context) -> str:
    if context.on_gpu:
        return "cuda"
    return "several-methods-cpu" if context.is_tiny else "cpu or find"


def _many(context: Context) -> Sequence[Command] | str:
    return [Command("many requests", context.module("many", "--out", "{figures}", *_tiny(context)))]


def _misses_of_many(figures: dict[str, dict[str, Any]]) -> list[str]:
    return list(figures.get("many requests", {}).get("misses", []))


def _ring(context: Context) -> Sequence[Command] | str:
    return [pytest(context, "query ring", ["tests/gpu/test_query_ring.py"], context.device)]


def _timings(context: Context) -> Sequence[Command] | str:
    command = [context.python, "-m", "benchmarks.kernels", "--device", context.device, "--out", "{figures}", "--quick"]
    if context.is_tiny:
        sizes = {"lengths": 160, "requests": 1, "tokens": 2, "layers": 1, "heads": 2, "query-heads": 4, "dim": 32}
        command += [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
        command += ["--seconds", "0.05", "--repeats", "1"]
    command += ["--within", str(TIMINGS_WITHIN * (1 if context.on_gpu else CPU_FACTOR))]
    # Its bars are of GPUs, and of a CPU without other work.
    return [Command("timings", command, passes=(0,) if context.on_gpu else (0, 1), meanings={1: MISSED})]


def _tiny(context: Context) -> list[str]:
    return ["--tiny"] if context.is_tiny or not context.on_gpu else []


STEPS = (
    Step(0, "load", "Do the carried library and its schemas fit this torch?", 20, _load),
    Step(1, "build", "Does this machine's nvcc build a library that loads?", 90, _build, in_background=True),
    Step(
        2, "native", "Are the CUDA operators right at real sizes, on streams, in graphs, without waiting?", 40, _native
    ),
    Step(3, "parity", "Do they agree with their definitions in all small cases, FP8 too?", 50, _parity),
    Step(4, "sanitizer", "Do they stay within their memory, without races?", 75, _sanitize),
    Step(5, "triton", "Do the Triton operators compile and agree too?", 110, _triton),
    Step(
        6,
        "first compaction",
        "How long does the first compaction of a process take?",
        50,
        _first_compaction,
        _misses_of_first_compaction,
        needs_quiet=True,
    ),
    Step(
        7,
        "timings",
        "How fast are the operators, against a copy and a matmul of this GPU?",
        TIMINGS_LIMIT,
        _timings,
        needs_quiet=True,
    ),
    Step(8, "engine", "Does an engine with CUDA graphs keep the right tokens, and attend to them?", 80, _engine),
    Step(
        9,
        "many",
        "What do 64 and 256 compactions in a step cost, in memory and host time?",
        30,
        _many,
        _misses_of_many,
        needs_quiet=True,
    ),
    Step(10, "ring", "Does the query ring hold the right queries after 2,000 replays?", 20, _ring),
)
