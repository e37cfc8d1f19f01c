"""Run the parts of the GPU tests in order of importance, each with a time limit; `gpu_test.sh` calls this.

Later parts run even if an earlier one fails. `results.json` is written anew after every part, so an interrupted run
leaves what it found. Only the standard library is imported, because the installation is what the first part tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
OUT = Path("build/gpu-test")
TAIL = 30
"""Lines of a part's output that are kept in the results."""
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
SUMMARY = re.compile(r"^=* ?(?:\d+ \w+(?:, )?)+ in [\d.]+s", re.MULTILINE)
PASSED, FAILED, TIMED_OUT, NOTHING_RAN, SKIPPED, NOT_RUN = (
    "passed", "FAILED", "TIMED OUT", "NOTHING RAN", "skipped", "not run",
)  # fmt: skip
BAD = (FAILED, TIMED_OUT, NOTHING_RAN, NOT_RUN)


@dataclass(frozen=True)
class Part:
    """A part of the tests.

    Attributes:
        name: for the summary and `--only`.
        question: that it answers.
        words: the command, after the interpreter.
        limit: seconds.
        must_run: whether it fails if all its tests are skipped.
    """

    name: str
    question: str
    words: Sequence[str]
    limit: float
    must_run: bool = False


@dataclass
class Result:
    """What became of a part.

    Attributes:
        part: the part.
        status: see `BAD` and its neighbours.
        seconds: it took.
        code: exit status, None if it was stopped.
        counts: tests by outcome, if it ran pytest.
        log: file with all its output.
        tail: the end of it.
    """

    part: Part
    status: str = NOT_RUN
    seconds: float = 0.0
    code: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    log: str = ""
    tail: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: value for name, value in vars(self).items() if name != "part"}
        return {"name": self.part.name, "question": self.part.question, "limit": self.part.limit, **own} | {
            "command": ["python", *self.part.words]
        }


def pytest(*words: str) -> tuple[str, ...]:
    """Return the words that run some tests, and say why others are skipped."""
    return ("-m", "pytest", "-rs", *words)


ENGINES = "tests/gpu/test_engine_cuda.py"
FIRST = "FLASH_ATTN-full-v2"
"""Attention backend, graphs and runner that vLLM chooses by itself on most GPUs."""
SERVED = {"attention_backend": "FLASH_ATTN", "async_scheduling": True, "compilation_config": {"cudagraph_mode": "FULL"}}


def parts(out: Path, *, on_cpu: bool, full: bool) -> list[Part]:
    """Return all parts of a run, the most important first.

    Args:
        out: folder for the figures of measurements.
        on_cpu: on vLLM's CPU backend, where everything that needs a GPU is skipped.
        full: also the matrix of all backends, graph modes and runners.
    """
    engine = "CPU_ATTN-eager-v1" if on_cpu else FIRST
    operators = ("tests/gpu/test_ops_cuda.py", *map(str, sorted((ROOT / "tests/unit/ops").glob("test_parity*.py"))))
    doctor = "import sys; from skipkv_vllm.cli.doctor import examine; found = examine(); "
    doctor += "print(*found.lines, sep='\\n'); sys.exit(not found.healthy)"
    timed = ("-m", "benchmarks.kernels", "--quick", "--out", str(out / "kernels.json"))
    small = ("--lengths", "640", "--layers", "1", "--heads", "2", "--query-heads", "8", "--tokens", "2")
    timed += ("--device", "cpu", "--threads", "1", *small) if on_cpu else ("--device", "cuda")
    chosen = [
        Part(
            "installation", "Is everything installed, and which backend runs each operator?", ("-c", doctor), 90, True
        ),
        Part(
            "CUDA operators",
            "Do the CUDA operators agree with their definitions, without waiting, in graphs and at any size?",
            pytest("-q", "-k", "native and cuda", *operators),
            150,
            not on_cpu,
        ),
        Part(
            "exactness",
            f"Do engines with {engine} keep and write what the oracle does?",
            pytest("-v", "-k", f"equals_the_reference and {engine}", ENGINES),
            300,
            True,
        ),
        Part(
            "served engine",
            "Does an 8B model run with FLASH_ATTN, full graphs and asynchronous scheduling, without waiting for the "
            "device or compiling kernels, and what does a step cost?",
            ("-m", "benchmarks.overhead", *_served(on_cpu), "--out", str(out / "served.json")),
            420,
        ),
        Part("speed of the operators", "How fast are they against the device's limits?", timed, 240),
        Part(
            "other properties of that engine",
            "Is it equal to stock vLLM where nothing is evicted, with FP8 caches, and after sleep?",
            pytest("-v", "-k", f"{engine} and not equals_the_reference", ENGINES),
            900,
            True,
        ),
        Part(
            "Triton operators",
            "Do the Triton operators agree with their definitions?",
            pytest("-q", "-k", "triton and cuda", *operators),
            600,
            not on_cpu,
        ),
        Part(
            "an independent attention kernel",
            "Does xFormers' attention see every survivor once?",
            pytest("-q", "tests/gpu/test_xformers_cuda.py"),
            180,
        ),
        Part(
            "FP8 keys", "Are 8-bit keys read as the model cached them?", pytest("-q", "tests/engine/test_fp8.py"), 900
        ),
    ]
    if full:
        chosen.append(
            Part("all engines", "Do all backends, graph modes and runners?", pytest("-rA", ENGINES), 4 * 3600, True)
        )
    return chosen


def _served(on_cpu: bool) -> tuple[str, ...]:
    """Return the options of the engine that resembles a served one."""
    if on_cpu:
        sizes = ("--shape", "small", "--dtype", "float32", "--budgets", "64", "--buffer", "32", "--rounds", "1")
        return (*sizes, "--batch-sizes", "1", "2", "--one-by-one", "--strict", "--engine", "{}")
    sizes = ("--shape", "qwen3-8b", "--dtype", "bfloat16", "--budgets", "1024", "--rounds", "2")
    return (
        *sizes,
        "--batch-sizes",
        "128",
        "1",
        "--compiled",
        "--one-by-one",
        "--strict",
        "--engine",
        json.dumps(SERVED),
    )


def run_part(part: Part, log: Path, patience: float, environment: Mapping[str, str]) -> Result:
    """Run a part in a process group of its own, which ends with its time; its output goes to the log and to stdout."""
    started, result = time.monotonic(), Result(part, log=str(log))
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        copying = threading.Thread(target=_copy, args=(process, file), daemon=True)
        copying.start()
        try:
            result.code = process.wait(patience * part.limit)
        except subprocess.TimeoutExpired:
            result.status = TIMED_OUT
        finally:
            # Engines that outlive their parent would keep the memory of the next part.
            _end_group(process)
            copying.join(10)
    result.seconds = round(time.monotonic() - started, 1)
    text = log.read_text(errors="replace")
    result.tail = text.splitlines()[-TAIL:]
    result.counts = _counts(text)
    if result.status != TIMED_OUT:
        result.status = _status(part, result.code, result.counts)
    return result


def _copy(process: subprocess.Popen[str], file: TextIO) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        file.write(line)
        file.flush()
        print(line, end="", flush=True)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End what is left of a part's processes."""
    for kind, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if not _is_alive(process.pid):
                return


def _is_alive(group: int) -> bool:
    for _ in range(20):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def _counts(text: str) -> dict[str, int]:
    """Read the last line of pytest, if it ran."""
    lines = [match.group() for match in SUMMARY.finditer(text)]
    return (
        {kind.rstrip("s") if kind == "errors" else kind: int(n) for n, kind in COUNTS.findall(lines[-1])}
        if lines
        else {}
    )


def _status(part: Part, code: int | None, counts: Mapping[str, int]) -> str:
    ran_pytest = "pytest" in part.words
    if code == 0 and (not ran_pytest or counts.get("passed")):
        return PASSED
    # 5: no test was selected.
    if ran_pytest and code in (0, 5):
        return NOTHING_RAN if part.must_run else SKIPPED
    return FAILED


def main(arguments: Sequence[str] | None = None, chosen: Sequence[Part] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words; None for those of this process.
        chosen: parts to run instead of the real ones.

    Returns:
        0 if every part passed or was skipped, 1 if any did not, 2 without a GPU or such a part, 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    on_cpu = os.environ.get("SKIPKV_GPU_TESTS") == "cpu"
    out = args.out.resolve()
    if chosen is None:
        chosen = parts(out, on_cpu=on_cpu, full=args.full or os.environ.get("FULL") == "1")
        if not on_cpu and not args.list and (why := _no_gpu()):
            print(f"error: {why}", file=sys.stderr)
            return 2
    if args.only:
        unknown = [name for name in args.only if not any(name in part.name for part in chosen)]
        if unknown:
            print(f"error: --only {unknown[0]!r}: no such part; --list names them", file=sys.stderr)
            return 2
        chosen = [part for part in chosen if any(name in part.name for name in args.only)]
    if args.list:
        for part in chosen:
            print(f"{part.name} (at most {part.limit:g} s): {part.question}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    # A model that is not there must not be looked for.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    results = [Result(part) for part in chosen]
    about = _about(on_cpu)
    status = 0
    try:
        for number, part in enumerate(chosen):
            print(f"\n==== {part.name} (at most {args.patience * part.limit:g} s): {part.question}", flush=True)
            log = out / f"{number + 1:02}-{part.name.replace(' ', '-')}.log"
            results[number] = run_part(part, log, args.patience, environment)
            print(f"---- {part.name}: {results[number].status} after {results[number].seconds:.0f} s", flush=True)
            write(out, about, results)
    except KeyboardInterrupt:
        status = 130
    write(out, about, results)
    _summarise(results, out)
    return status or int(any(result.status in BAD for result in results))


def write(out: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write `results.json`, whole or not at all."""
    seconds = round(sum(result.seconds for result in results), 1)
    fresh = out / "results.json.new"
    figures = {"run": {**about, "seconds": seconds}, "parts": [result.as_dict() for result in results]}
    fresh.write_text(json.dumps(figures, indent=1) + "\n")
    fresh.replace(out / "results.json")


def _summarise(results: Sequence[Result], out: Path) -> None:
    print(f"\n{'part':34}{'result':13}{'s':>7}   tests")
    for result in results:
        counted = ", ".join(f"{number} {kind}" for kind, number in result.counts.items())
        print(f"{result.part.name:34}{result.status:13}{result.seconds:7.0f}   {counted}")
    bad = [result for result in results if result.status in BAD]
    for result in bad:
        if result.log:
            print(f"\n{result.part.name}: {result.status}; all output: {result.log}")
            print("\n".join(f"  {line}" for line in result.tail[-10:]))
    print(f"\n{len(results) - len(bad)} of {len(results)} parts without a failure; wrote {out / 'results.json'}")


def _about(on_cpu: bool) -> dict[str, Any]:
    """Describe the machine as far as the package can."""
    code = "import json; from skipkv_vllm.evaluation.machine import commit, machine, versions; "
    code += "print(json.dumps({'commit': commit(), 'machine': machine(), 'versions': versions()}))"
    found: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "on_cpu": on_cpu}
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        return found | json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return found


def _no_gpu() -> str | None:
    """Return why no GPU can be tested, and the remedy."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0:
        return None
    return (
        f"{sys.executable} sees no GPU (torch.cuda.is_available() is False)\n"
        "       Install a CUDA build of torch and vLLM (scripts/bootstrap.sh does), or set PYTHON."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu_test.sh", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also all backends, graph modes and runners: hours")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--patience", type=float, default=1.0, metavar="N", help="multiply all time limits")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for results.json, logs and figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
