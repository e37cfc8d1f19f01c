"""The benchmark of the operators as a GPU runs it: events, graphs and memory of a stand-in, operators on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import __main__ as command_line
from benchmarks.kernels import parts
from benchmarks.kernels.clocks import CPU, CudaClock
from benchmarks.kernels.machine import Limits, Machine
from benchmarks.results.sections.operators import operators_section
from benchmarks.simulate.calibration import read_costs
from benchmarks.simulate.eviction import Eviction
from benchmarks.simulate.gpus import GPUS
from skipkv_vllm.capacity import ModelShape
from skipkv_vllm.ops import native, torch_backend
from tests.unit.benchmarks.fake_cuda import FakeCuda

SIZES = ["--lengths", "96", "--buffer", "32", "--layers", "2", "--heads", "2", "--query-heads", "4", "--dim", "32"]
WORDS = [*SIZES, "--threads", "1", "--repeats", "2", "--seconds", "0", "--tokens", "1", "3", "--requests", "1", "3"]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def machine_on(cuda: FakeCuda, **backends: object) -> Machine:
    if native in backends.values() and (why := native.unavailable("cpu")):
        pytest.skip(why)
    clock = CudaClock(CPU, cuda)
    return Machine(clock, backends, ("other: is not there",), Limits(CPU, 16, 4096, torch.bfloat16))


def test_every_row_of_a_gpu_is_made(cuda, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    machine = machine_on(cuda, native=native, triton=torch_backend)
    assert command_line.main([*WORDS, "--out", str(out)], machine) in (0, 1)
    said = capsys.readouterr().out
    assert "a call takes at most this share of the memory" in said
    figures = json.loads(out.read_text())
    run = figures["run"]
    assert (run["device"]["name"], run["device"]["ours"]) == ("Fake H100", "native")
    assert run["device"]["missed"] == ["other: is not there"]
    assert {"commit", "versions", "machine"} <= run.keys()
    # Defaults of a GPU.
    assert (run["settings"]["layout"], run["settings"]["dtype"], run["settings"]["page_size"]) == (
        "rows",
        "bfloat16",
        16,
    )
    assert [row["requests"] for row in figures["scoring"]] == [1, 1, 3, 3]
    for row in figures["scoring"]:
        assert {"ours_ms", "triton_ms", "host_us", "floor_ms", "of_floor", "formula_bytes"} <= row.keys()
        assert ("rkv_ms" in row) == ("pytorch_ms" in row) == (row["requests"] == 1)
        assert row["ours_peak_bytes"] == cuda.peak
        assert row["rounds"] == 2
    assert [row["error_formula_bytes"] > 0 for row in figures["measuring"]] == [True, True]
    assert ["rewrite_ms" in row for row in figures["compaction"]] == [True, False]
    assert [(row["tokens"], row["graph"]) for row in figures["steps"]].count((3, True)) == 2
    # A graph for each backend and PyTorch, of two operators at two sizes.
    assert len(cuda.graphs) == 2 * 2 * 3
    assert all(graph.replays for graph in cuda.graphs)
    page = "\n\n".join(operators_section(figures))
    assert "on Fake H100" in page
    assert "Triton, ms" in page


@pytest.mark.parametrize("rule", ["redundancy", "error", "attention"])
@pytest.mark.parametrize("tracks", ["words", "embeddings", ""])
def test_the_simulator_reads_the_figures(cuda, tmp_path, rule, tracks):
    out = tmp_path / "kernels.json"
    command_line.main([*WORDS, "--out", str(out)], machine_on(cuda, native=native))
    costs = read_costs(out, GPUS["H100"], 7.6e9)
    shape = ModelShape(4, 8, 4, 32, 256, 1000, 2)
    found = costs.of(shape, Eviction("method", 80, 32, rule, tracks=tracks), 4)
    assert all(part >= 0 for part in found)
    assert found.per_compaction > 0


def test_a_quick_run_compares_single_requests_only(cuda, tmp_path):
    out = tmp_path / "kernels.json"
    command_line.main([*WORDS, "--quick", "--out", str(out)], machine_on(cuda, native=native, triton=torch_backend))
    assert ["triton_ms" in row for row in json.loads(out.read_text())["scoring"]] == [True, True, False, False]


def test_a_quick_run_that_is_stopped_leaves_its_rows(cuda, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "bench_step", stop)
    out = tmp_path / "deeper" / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        command_line.main([*WORDS, "--quick", "--out", str(out)], machine_on(cuda, native=native))
    assert [row["requests"] for row in json.loads(out.read_text())["scoring"]] == [1, 1, 3, 3]


def names(which: list[parts.Part]) -> list[str]:
    return [str(each) for each in which]


def test_the_most_important_parts_come_first():
    """Of a GPU's sizes: what bars are about, then the rest by the time that it takes."""
    given = command_line.DEFAULTS["cuda"]
    sizes = command_line._parser().parse_args([])
    command_line._complete(sizes, "cuda")
    every = parts.parts_of(command_line._settings(sizes), given["tokens"])
    assert len(every) == len(given["lengths"]) * len(given["requests"]) + len(given["tokens"])
    ordered = names(sorted(every, key=parts.Part.importance))
    assert ordered[:4] == ["1 x 2176", "steps of 128", "16 x 2176", "64 x 2176"]
    assert ordered[4:6] == ["1 x 1152", "1 x 4224"]
    assert ordered[-2:] == ["64 x 1152", "64 x 4224"]


def test_a_run_that_must_end_names_what_it_did_not_reach(cuda, tmp_path, monkeypatch, capsys):
    """Time passes with every part; the rows of those that were reached are in the order of the tables."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    out, seen = tmp_path / "kernels.json", []
    real = parts._measure
    monkeypatch.setattr(parts, "_measure", lambda *given: seen.append(str(given[2])) or real(*given))
    words = [*WORDS, "--quick", "--within", "15", "--out", str(out)]
    assert command_line.main(words, machine_on(cuda, native=native)) in (0, 1)
    assert seen == ["1 x 96", "steps of 1"]
    figures = json.loads(out.read_text())
    assert [row["requests"] for row in figures["scoring"]] == [1, 1]
    assert {row["tokens"] for row in figures["steps"]} == {1}
    assert figures["not_reached"] == ["3 x 96", "steps of 3"]
    assert "not reached in 15 s: steps of 3" in capsys.readouterr().out


def test_without_a_limit_nothing_is_left_out(cuda, tmp_path):
    out = tmp_path / "kernels.json"
    command_line.main([*WORDS, "--out", str(out)], machine_on(cuda, native=native))
    assert "not_reached" not in json.loads(out.read_text())


def test_rows_that_do_not_fit_are_named(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    small = FakeCuda(free=2**30)
    command_line.main([*WORDS, "--out", str(out)], machine_on(small, native=native))
    figures = json.loads(out.read_text())
    assert [(row["requests"], row["length"]) for row in figures["skipped"]] == [(1, 96), (3, 96)]
    assert not figures["scoring"]
    assert "skipped 3 x 96: 1 GiB needed, 1 free" in capsys.readouterr().err
    assert "Memory did not suffice for these requests x tokens: 1 x 96, 3 x 96." in "\n".join(
        operators_section(figures)
    )


def test_a_call_is_timed_on_a_busy_device_with_a_cold_cache(cuda):
    clock = CudaClock(CPU, cuda)
    order: list[str] = []
    clock._flush = type("Flush", (), {"zero_": lambda self: order.append("flush")})()
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    cuda.said.clear()
    times = clock.interleaved(works, 3, 0.0)
    assert [len(each) for each in times.values()] == [3, 3]
    # Once to compile and once for the host's time; then in turns, each with a cold cache.
    assert order == ["a", "a", "b", "b"] + ["flush", "a", "flush", "b"] * 3
    waits = [i for i, name in enumerate(cuda.said) if name == "synchronize"]
    per_round = cuda.said[waits[-2] + 1 : waits[-1]]
    assert per_round == ["Event", "Event", "_sleep"] * 2


def test_the_device_has_the_properties_that_are_asked_for(cuda):
    stubs = Path(torch._C.__file__ or "").parent / "_C" / "__init__.pyi"
    text = stubs.read_text().partition("class _CudaDeviceProperties:")[2].partition("\n\n")[0]
    used = re.findall(
        r"(?:found|_properties)\.(\w+)", Path(sys.modules[CudaClock.__module__].__file__ or "").read_text()
    )
    assert len(set(used)) >= 6
    assert set(used) <= set(re.findall(r"^    (\w+):", text, re.MULTILINE))


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no GPU" in capsys.readouterr().err


def test_without_vllm_the_command_can_be_imported():
    """A bare machine has PyTorch and NumPy; the operators and this command need no more."""
    blocked = ("vllm", "pydantic", "typer", "transformers", "safetensors", "prometheus_client", "matplotlib")
    code = (
        "import sys\n"
        f"sys.modules |= dict.fromkeys({blocked})\n"
        "from benchmarks.kernels.__main__ import main\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout


def test_tritons_own_kernels_run(tmp_path):
    """Run the GPU's path with Triton's interpreter, which must be the first thing that Triton hears of."""
    pytest.importorskip("triton")
    out = tmp_path / "kernels.json"
    words = ["--lengths", "40", "--buffer", "8", "--layers", "1", "--heads", "1", "--query-heads", "2", "--dim", "16"]
    words += ["--repeats", "1", "--seconds", "0", "--tokens", "2", "--requests", "1", "--dtype", "float32"]
    words += ["--threads", "1", "--out", str(out)]
    code = (
        "from tests import triton_cpu\n"
        "triton_cpu.register_backend()\n"
        "triton_cpu.make_faster()\n"
        "from benchmarks.kernels import __main__ as command_line\n"
        "from skipkv_vllm.ops import triton_backend\n"
        "from tests.unit.benchmarks.fake_cuda import FakeCuda\n"
        "from tests.unit.benchmarks.test_kernels_on_gpu import machine_on\n"
        f"command_line.main({words!r}, machine_on(FakeCuda(), triton=triton_backend))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(out.read_text())
    assert figures["run"]["device"]["ours"] == "triton"
    assert all(row["relative_error"] < 1e-4 for row in figures["scoring"])
    assert {row["operator"] for row in figures["steps"]} >= {"recorded queries, all layers", "corrections"}
