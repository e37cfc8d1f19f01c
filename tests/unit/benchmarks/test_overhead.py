"""The benchmark of a step's cost without an engine: arguments, the turns of the engines, and its figures."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.overhead import __main__ as command_line
from benchmarks.overhead import measure
from benchmarks.overhead.engine import unlike
from benchmarks.overhead.models import SHAPES, shaped_model
from benchmarks.results.sections.cost import overhead_section, steering_overhead_section
from skipkv_vllm import bundled_model
from skipkv_vllm.capacity import shape_of


class Engine:
    """Stands in for `Remote`: a stock step takes 1 ms, any other 1.5 ms; every start has some more compactions."""

    compacts = True
    calls: list[str] = []

    def __init__(self, arm, shape, args, folder):
        self.arm, self.starts, self.batch_size = arm, 0, shape.batch_size
        self.calls.append(f"start {arm} for {shape.batch_size}")

    def call(self, method, *arguments):
        if method == "describe":
            return {"runner": "v2"}
        if method == "take":
            (self.batch_size,) = arguments
            self.calls.append(f"{self.arm} takes {self.batch_size}")
            return None
        if method == "steps":
            return arguments[0] * (1e-3 if self.arm == "stock" else 1.5e-3)
        self.starts += 1
        return 4 * self.batch_size * self.starts if self.compacts and self.arm != "stock" else 0

    def stop(self):
        self.calls.append(f"stop {self.arm}")


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(measure, "Remote", Engine)
    monkeypatch.setattr(Engine, "calls", [])


WORDS = ["--budgets", "64", "--batch-sizes", "2", "--rounds", "3", "--buffer", "32"]


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("words", "section", "shown"),
    [
        ([], overhead_section, "| 64 | 2 | 1.00 | 1.500 | 1.500 to 1.500 | 24 |"),
        (["--steering"], steering_overhead_section, "| 64 | 2 | 1.00 | 1.500 (1.500 to 1.500) | 1.500"),
    ],
)
def test_figures_are_printed_kept_and_shown(tmp_path, capsys, words, section, shown):
    out = tmp_path / "out.json"
    assert command_line.main([*WORDS, *words, "--out", str(out)]) == 0
    assert "1.500 - 1.500" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["run"]["command"][:3] == ["python", "-m", "benchmarks.overhead"]
    assert shown in "\n".join(section(figures))


@pytest.mark.usefixtures("engines")
def test_where_memory_holds_one_engine_it_measures_all_batch_sizes(tmp_path):
    out = tmp_path / "out.json"
    words = ["--budgets", "64", "--batch-sizes", "8", "2", "--rounds", "3", "--buffer", "32", "--one-by-one"]
    assert command_line.main([*words, "--out", str(out)]) == 0
    assert Engine.calls == [
        f"{verb} {arm}{rest}"
        for arm in ("stock", "evicting")
        for verb, arm, rest in (
            ("start", arm, " for 8"),
            (arm, "takes", " 8"),
            (arm, "takes", " 2"),
            ("stop", arm, ""),
        )
    ]
    rows = json.loads(out.read_text())["shapes"]
    # Three rounds, each with the four compactions of a request that the start after it has more.
    assert [(row["batch_size"], row["compactions"], row["ratio"]) for row in rows] == [
        (8, 96, pytest.approx(1.5)),
        (2, 24, pytest.approx(1.5)),
    ]
    assert rows[0]["engines"] == {"stock": {"runner": "v2"}, "evicting": {"runner": "v2"}}


def test_an_engine_that_runs_otherwise_than_asked_is_named():
    got = {"attention": "TRITON_ATTN", "graphs": "FULL_DECODE_ONLY", "async": True, "runner": "v2"}
    full = {"compilation_config": {"cudagraph_mode": "FULL"}, "async_scheduling": True}
    assert unlike(full, got) == []
    assert unlike(full | {"attention_backend": "FLASH_ATTN"}, got) == ["attention is TRITON_ATTN, not FLASH_ATTN"]
    assert unlike(full, got | {"graphs": "PIECEWISE", "async": False}) == [
        "graphs is PIECEWISE, not FULL",
        "async is False, not True",
    ]
    assert unlike({}, got) == []


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_published_shape_needs_no_network(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shaped_model(name, bundled_model(), tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3ForCausalLM"]
    # Every token of the tokenizer is one of the model.
    assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
    shape = shape_of(config, ranks=1, element_size=2)
    if name == "qwen3-8b":
        assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_size) == (36, 32, 8, 128)
        assert shape.kv_bytes == 147456


@pytest.mark.usefixtures("engines")
def test_figures_without_compactions_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Engine, "compacts", False)
    out = tmp_path / "out.json"
    assert command_line.main([*WORDS, "--out", str(out)]) == 1
    assert "error: hardly any compaction took place" in capsys.readouterr().err
    assert not out.exists()


def test_a_gpu_needs_to_be_told_that_it_holds_two_engines(capsys, monkeypatch):
    monkeypatch.setattr(command_line.torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        command_line.main([])
    assert "use --one-by-one, or --memory 0.45" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "full"], "--policy full evicts nothing"),
        (["--buffer", "20"], "--buffer 20 must be a multiple of 16"),
        (["--budgets", "3900"], "--budgets 3900 is out of range; allowed: up to 3616"),
        (["--layers", "2"], "--layers and --hidden-size only go together"),
        (["--layers", "2", "--hidden-size", "100"], "--layers 2 --hidden-size 100 is out of range"),
        (["--steering", "--layers", "2", "--hidden-size", "256"], "--steering is measured on --model"),
        (["--steering", "--one-by-one"], "--steering is measured on --model"),
        (["--shape", "small", "--layers", "2", "--hidden-size", "256"], "--shape has its own --layers"),
    ],
)
def test_bad_arguments_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
