"""`skipkv extract-vector` and `import-vector`: the commands, with a stand-in for the engine where one is needed."""

from __future__ import annotations

import contextlib
import json
import re
import sys

import pytest
import torch

from benchmarks.tiny_reasoner.problems import make_problem, problems
from skipkv_vllm import bundled_model
from skipkv_vllm.cli import generation, main
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.steering.extraction.sweep import Cell, Outcome, cell, choose

MODEL = bundled_model()
KEYWORDS = "benchmarks/tiny_reasoner/thoughts.json"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def files(tmp_path):
    """Write files of traces, training problems and development problems."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    train = [make_problem(10**9 + i, rules=(2, 2), doubt=(0.8, 0.8)) for i in range(4)]
    traces = [{"prompt": f"{p.question}<think>\n", "response": p.completion, "correct": True} for p in train]
    asked = [{"question": p.question, "answer": str(p.answer)} for p in problems("dev", 3)]
    return {
        "traces": write("traces.jsonl", traces),
        "dev": write("dev.jsonl", asked),
        "out": tmp_path / "v.safetensors",
    }


@pytest.fixture
def answers(monkeypatch):
    """Answers of an imaginary model: with alpha0 of 1 at layer 2 they are short and right."""
    calls = []

    @contextlib.contextmanager
    def engine(model, arguments, vectors=None):
        for file in (vectors or {}).values():
            SteeringVector.load(file)
        yield sorted(vectors or {})

    def answer(llm, jobs, max_tokens, temperature, seed):
        calls.append((llm, jobs))
        right = {p.question: p for p in problems("dev", 3)}
        out = []
        for job in jobs:
            problem = next(p for q, p in right.items() if q in job.prompt)
            options = (job.options.get("steering"), job.options.get("steering_alpha0"))
            length = {("layer-2", 1.0): 100, ("layer-3", 2.0): 50}.get(options, 200)
            text = problem.completion if length != 50 else "</think>\\boxed{77}"
            out.append(generation.Answer(text, length, False))
        return out

    monkeypatch.setattr(generation, "engine", engine)
    monkeypatch.setattr(generation, "answer", answer)
    return calls


def test_a_vector_from_traces(files, capsys):
    code, out, err = run(
        capsys,
        *("extract-vector", "--model", MODEL, "--layer", 3, "--traces", files["traces"], "--keywords", KEYWORDS),
        *("--min-thoughts", 5, "--out", files["out"]),
    )
    assert code == 0, err
    vector = SteeringVector.load(files["out"])
    assert (vector.layer, vector.num_layers, vector.base_model) == (3, 4, MODEL)
    # Two rules per problem: two thoughts that search and one that concludes.
    assert (vector.execution, vector.transition) == (12, 0)
    assert vector.reflection > 5
    assert "4 texts, thoughts: 12 execution" in out
    assert f"norm {vector.norm:.4g}" in out
    assert f"split-half cosine {vector.split_half_cosine:.4f}" in out


def test_traces_are_generated_graded_kept_and_balanced(files, answers, capsys, tmp_path):
    kept = tmp_path / "kept.jsonl"
    code, out, err = run(
        capsys,
        *("extract-vector", "--model", MODEL, "--layer", 2, "--dataset", files["dev"], "--problems", 3),
        *("--keywords", KEYWORDS, "--per-outcome", 2, "--min-thoughts", 5, "--save-traces", kept),
        *("--out", files["out"]),
    )
    assert code == 0, err
    assert "3 texts of 200 tokens, 3 of 3 right, 0 truncated" in out
    assert "2 texts, thoughts: 10 execution" in out
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True] * 3
    assert all(row["prompt"].endswith("<think>\n") for row in rows)


def test_auto_keeps_the_layer_whose_answers_are_short_and_right(files, answers, capsys):
    code, out, err = run(
        capsys,
        *("extract-vector", "--model", MODEL, "--layer", "auto", "--traces", files["traces"], "--keywords", KEYWORDS),
        *("--min-thoughts", 5, "--dev", files["dev"], "--dev-problems", 3, "--layers", "1,2,3", "--alpha0", "1,2"),
        *("--gamma", 0.02, "--out", files["out"]),
    )
    assert code == 0, err
    assert SteeringVector.load(files["out"]).layer == 2
    assert "best: layer 2 with alpha0 1: 100 tokens instead of 200" in out
    ((names, jobs),) = answers
    assert names == ["layer-1", "layer-2", "layer-3"]
    assert len(jobs) == 3 * (1 + 3 * 2)
    assert jobs[0].options == {}
    assert jobs[3].options == {"steering": "layer-1", "steering_alpha0": 1.0, "steering_gamma": 0.02}
    figures = json.loads(files["out"].with_suffix(".sweep.json").read_text())
    assert figures["settings"]["dev_problems"] == 3
    assert figures["settings"]["keywords"] == KEYWORDS
    assert {"layer": 3, "alpha0": 2.0, "accuracy": 0.0, "mean_length": 50.0, "truncated": 0.0} in figures["cells"]
    assert files["out"].with_suffix(".sweep.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layer": "4"}, r"layer=4 is out of range: .* has 4 layers; allowed: 0 to 3"),
        ({"--layer": "last"}, "--layer 'last' must be integers separated by commas or \"auto\", e.g. 16,20,24"),
        ({"--layer": "auto"}, "--layer auto needs development problems"),
        ({"--traces": None}, "not both"),
        ({"--dataset": "math-train"}, "not both"),
        ({"--traces": "none.jsonl"}, "cannot read none.jsonl"),
        ({"--keywords": "seel"}, "keywords='seel' is neither"),
        ({"--dtype": "int8"}, "--dtype 'int8' is not one of: float32, bfloat16, float16"),
        ({"--min-thoughts": "1000"}, r"each side needs at least 1000 \(--min-thoughts\)"),
        ({"--out": "none/v.safetensors"}, "--out none/v.safetensors: its folder does not exist"),
        ({"--save-traces": "none/texts.jsonl"}, "--save-traces none/texts.jsonl: its folder does not exist"),
        ({"--out": "/tmp"}, "--out /tmp: is a folder; name a file in it"),
        ({"--model": "none/such"}, "model='none/such' cannot be opened"),
        ({"--engine": "[]"}, r"--engine: .* is JSON but not an object"),
        # All tokens enter the first layer in the same state.
        ({"--layer": "0"}, "layer 0: all thoughts begin in the same state"),
        ({"--per-outcome": "2", "--traces": "unknown"}, "needs texts that are known to be right or wrong"),
    ],
)
def test_bad_options_of_extract_vector(files, capsys, changes, message, tmp_path):
    (tmp_path / "unknown").write_text('{"prompt": "<think>", "response": "a"}\n')
    options = {"--model": MODEL, "--layer": "1", "--traces": str(files["traces"]), "--keywords": KEYWORDS}
    options |= {"--min-thoughts": "5", "--out": str(files["out"])} | changes
    if options["--traces"] == "unknown":
        options["--traces"] = str(tmp_path / "unknown")
    code, _, err = run(capsys, "extract-vector", *(w for k, v in options.items() if v is not None for w in (k, v)))
    assert code == 2
    assert re.search(f"skipkv: error: .*{message}", err), err
    assert not files["out"].exists()


def test_auto_needs_answers(files, capsys, tmp_path):
    (tmp_path / "open.jsonl").write_text('{"question": "q"}\n')
    code, _, err = run(
        capsys,
        *("extract-vector", "--model", MODEL, "--layer", "auto", "--traces", files["traces"], "--out", files["out"]),
        *("--dev", tmp_path / "open.jsonl", "--dev-problems", 1),
    )
    assert code == 2
    assert "1 problems have no answer" in err


def test_import_vector(tmp_path, capsys):
    torch.save(torch.ones(128), tmp_path / "layer_1_steervec.pt")
    out = tmp_path / "v.safetensors"
    code, text, err = run(capsys, "import-vector", tmp_path / "layer_1_steervec.pt", "--model", MODEL, "--out", out)
    assert code == 0, err
    assert "layer 1 of 4" in text
    assert torch.equal(SteeringVector.load(out).values, -torch.ones(128))
    arguments = ("import-vector", tmp_path / "layer_1_steervec.pt", "--model", MODEL, "--out", out)
    code, _, err = run(capsys, *arguments, "--sign", "RT+E")
    assert code == 2
    assert "--sign 'RT+E' is neither E-RT" in err
    code, _, err = run(capsys, *arguments, "--layer", 2)
    assert code == 2
    assert "--layer 2 contradicts the file name layer_1_steervec.pt" in err


def test_the_best_cell():
    plain = Cell(None, 0, 0.9, 100, 0)
    cells = [Cell(1, 1.0, 0.8, 10, 0), Cell(1, 2.0, 0.89, 50, 0), Cell(2, 0.5, 0.9, 50, 0), Cell(3, 0.5, 0.9, 50, 0)]
    assert choose(plain, cells, 0.01) == cells[2]
    assert choose(plain, cells[:2], 0.0101) == cells[1]
    with pytest.raises(KVPolicyError, match=r"no layer and strength shortened the answers \(100 tokens\)"):
        choose(plain, cells[:1], 0.01)
    assert cell(3, 0.5, [Outcome(True, 10, False), Outcome(False, 30, True)]) == Cell(3, 0.5, 0.5, 20, 0.5)


def test_plots_need_matplotlib(monkeypatch, tmp_path):
    from skipkv_vllm.cli.sweep_plot import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KVPolicyError, match="matplotlib"):
        plot(Cell(None, 0, 1, 1, 0), [], tmp_path / "a.svg")


def test_the_sweep_is_not_started_without_its_libraries(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    code, _, err = run(
        capsys,
        *("extract-vector", "--model", MODEL, "--layer", "auto", "--traces", files["traces"], "--out", files["out"]),
        *("--dev", files["dev"], "--dev-problems", 3),
    )
    assert code == 2
    assert "math-verify" in err
