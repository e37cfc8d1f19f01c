"""The simulator's calibration: files of other benchmarks or devices are refused, and measured times are reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.steps import BY_WORDS, CORRECTIONS, RECORDED
from benchmarks.results.sections.simulation import simulation_section
from benchmarks.simulate import __main__ as command_line
from benchmarks.simulate.calibration import read_costs
from benchmarks.simulate.eviction import OPERATIONS, Eviction, assumed_cost
from benchmarks.simulate.gpus import GPUS, Efficiency
from benchmarks.simulate.steptime import StepTime
from skipkv_vllm import KVPolicyError
from skipkv_vllm.capacity import ModelShape

SHAPE = ModelShape(36, 32, 8, 128, 4096, 151936, 2)
WORDS = ["--models", "7B", "--gpus", "1", "--outputs", "2000", "--requests", "8", "--stride", "64"]


def run_of(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "command": ["python", "-m", kind],
        "commit": "c0ffee",
        "date": "2026-12-01",
        "machine": {"cpu": "Some CPU", "cores": 2, "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB"]},
        **more,
    }


def kernels(**more: Any) -> dict[str, Any]:
    """Figures in which a token of a layer and kv head costs 1 ns in most operators, and n / 1000 ns where keys are
    distinct; calls of 64 requests cost half."""
    settings = {"layers": 36, "heads": 8, "query_heads": 32, "dim": 128}
    figures: dict[str, list[dict]] = {"scoring": [], "measuring": [], "compaction": [], "steps": []}
    for requests in (1, 64):
        for length in (1000, 3000):
            ms = 1e-6 * requests * length * 36 * 8 * (0.5 if requests == 64 else 1)
            row = {"length": length, "requests": requests}
            figures["scoring"] += [
                row | {"keys": "similar", "ours_ms": ms},
                row | {"keys": "distinct", "ours_ms": ms * length / 1000},
            ]
            names = ("attention_ours_ms", "error_ours_ms", "similarity_ours_ms")
            figures["measuring"].append(row | dict.fromkeys(names, ms) | {"queries": 32})
            figures["compaction"].append(row | dict.fromkeys(("ours_ms", "select_ms", "positions_ms"), ms))
    for tokens in (1, 101):
        for name, fixed in ((RECORDED, 0.05), (BY_WORDS, 0.01), (CORRECTIONS, 0.002)):
            figures["steps"].append({"operator": name, "tokens": tokens, "ours_ms": fixed + 1e-3 * (tokens - 1)})
    device = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    return {"run": run_of("benchmarks.kernels", settings=settings, device=device), **figures, **more}


def written(folder: Path, figures: Any) -> Path:
    path = folder / "figures.json"
    path.write_text(json.dumps(figures))
    return path


def test_times_of_the_operators_are_reproduced(tmp_path):
    costs = read_costs(written(tmp_path, kernels()), GPUS["H100"], 7.6e9)
    tokens = 2000 * 36 * 8

    def ns(rule: str, requests: int = 1, shape: ModelShape = SHAPE, **more: str) -> float:
        return costs.of(shape, Eviction("m", 2000, 128, rule, **more), requests).per_compaction * 1e9

    # Three operators move; one scores, by keys that lie between those that were measured.
    assert ns("redundancy", keys="similar") == pytest.approx(4 * tokens)
    assert ns("redundancy", keys="distinct") == pytest.approx((3 + 2) * tokens)
    # Four times in a buffer of 128 it reads positions and measures 32 queries; PyTorch then ranks.
    ranking = 1e9 * OPERATIONS * Efficiency().eager
    assert ns("attention") == pytest.approx((3 + 4 * 2) * tokens + ranking)
    assert ns("error") == pytest.approx((3 + 4 * 2 + 1) * tokens + ranking)
    # Some 8,000 requests bring 64 compactions to a step.
    assert ns("redundancy", 8192, keys="similar") == pytest.approx(2 * tokens)
    # Of another shape: by layers and kv heads; sums over queries by query heads.
    half = ModelShape(18, 32, 4, 128, 4096, 151936, 2)
    assert ns("redundancy", shape=half, keys="similar") == pytest.approx(4 * tokens / 4)
    assert ns("attention", shape=half) == pytest.approx((3 + 4 * (2 + 1)) * tokens / 4 + ranking)


def test_operators_of_every_step_are_a_line_in_the_tokens(tmp_path):
    costs = read_costs(written(tmp_path, kernels()), GPUS["H100"], 7.6e9)
    found = costs.of(SHAPE, Eviction("m", 2000, 128, "error", tracks="words"), 8)
    assert found.per_request == pytest.approx(3e-6)
    assert found.fixed == pytest.approx((0.05 + 0.01 + 0.002 - 3e-3) * 1e-3)
    bare = costs.of(SHAPE, Eviction("m", 2000, 128, "error", records=False), 8)
    assert bare.fixed == pytest.approx((0.002 - 1e-3) * 1e-3)
    half = ModelShape(18, 16, 8, 128, 4096, 151936, 2)
    fewer = costs.of(half, Eviction("m", 2000, 128, "error"), 8)
    assert fewer.per_request == pytest.approx((0.25 + 1) * 1e-6)


@pytest.mark.parametrize(
    ("shape", "eviction", "said"),
    [
        (
            SHAPE,
            Eviction("m", 4224, 128, "error"),
            "no figures for lengths above 3000; a request holds up to 4224.*--lengths 4224",
        ),
        (
            ModelShape(36, 32, 8, 64, 4096, 9, 2),
            Eviction("m", 2000, 128, "error"),
            "no figures for a head size of 64.*--dim 64",
        ),
        (SHAPE, Eviction("keydiff", 2000, 128, "keys"), "no times of keydiff.*leave --calibration out"),
        (SHAPE, Eviction("m", 2000, 128, "error", tracks="embeddings"), "no figures for sentences by embeddings"),
    ],
)
def test_what_was_not_measured_is_refused(tmp_path, shape, eviction, said):
    costs = read_costs(written(tmp_path, kernels()), GPUS["H100"], 7.6e9)
    with pytest.raises(KVPolicyError, match=said):
        costs.of(shape, eviction, 1)


ON_CPU = kernels(run=run_of("benchmarks.kernels", device={"type": "cpu"}))


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([], "no figures of a benchmark"),
        ({"rows": []}, "no figures of a benchmark (KeyError: 'run')"),
        ({"run": run_of("benchmarks.overhead")}, "was written by benchmarks.overhead; give a file of"),
        (
            ON_CPU,
            "was measured on a CPU (Some CPU), which says nothing about an H100; run `python -m benchmarks.kernels",
        ),
        (
            {"run": run_of("benchmarks.throughput") | {"machine": {"cpu": "Some CPU", "gpus": []}}},
            "was measured on a CPU (Some CPU)",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, figures, said):
    path = written(tmp_path, figures)
    with pytest.raises(SystemExit) as stop:
        command_line.main([*WORDS, "--calibration", str(path), "--out", str(tmp_path / "out.json")])
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_of_another_gpu_or_none_is_refused(tmp_path, capsys):
    with pytest.raises(KVPolicyError, match="measured on NVIDIA H100 80GB HBM3, which says nothing about an H200"):
        read_costs(written(tmp_path, kernels()), GPUS["H200"], 7.6e9)
    with pytest.raises(KVPolicyError, match="no figures of a benchmark"):
        read_costs(tmp_path / "missing.json", GPUS["H100"], 7.6e9)


def test_a_prediction_says_where_its_figures_come_from(tmp_path):
    out = tmp_path / "out.json"
    assert command_line.main([*WORDS, "--out", str(out)]) == 0
    assumed = json.loads(out.read_text())
    text = "\n".join(simulation_section(assumed))
    assert "(assumed, not measured)" in text
    assert "taken to reach 30% of the tensor cores' FLOP/s" in text
    figures = kernels(steps=[*kernels()["steps"], {"operator": RECORDED, "tokens": 1, "ours_ms": 0.05}])
    path = written(tmp_path, figures)
    assert command_line.main([*WORDS, "--calibration", str(path), "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert measured["rows"][0]["compaction_ms"] > 1.5 * assumed["rows"][0]["compaction_ms"]
    assert measured["rows"][0]["ratio"] != assumed["rows"][0]["ratio"]
    text = "\n".join(simulation_section(measured))
    assert "(assumed for the engine; times of the operators measured at commit c0ffee on 2026-12-01)" in text
    assert "taken to reach" not in text


def test_an_engines_figures_are_still_read(tmp_path):
    eviction = Eviction("rkv", 1152, 128, "redundancy")
    gpu, true = GPUS["H100"], Efficiency(launch=0.0, compaction=2.5)
    step = StepTime(5e-3, 0.0, 1e-6, 4e-6, 1e-8, assumed_cost(gpu, SHAPE, eviction, true).per_compaction)
    settings = {"policy": "rkv", "budget": 1024, "buffer": 128, "policy_config": {}}
    figures = {
        "run": run_of("benchmarks.throughput", settings=settings),
        "calibration": {"rkv": step.as_dict(), "shape": vars(SHAPE), "bound": 1152, "buffer": 128},
    }
    costs = read_costs(written(tmp_path, figures), gpu, 8.2e9)
    assert costs.origin == "measured at commit c0ffee on 2026-12-01"
    # The shares that the fit found differ from the assumed ones, so its multiple does too; its product does not.
    assert costs.of(SHAPE, eviction, 1).per_compaction == pytest.approx(step.per_compaction)
