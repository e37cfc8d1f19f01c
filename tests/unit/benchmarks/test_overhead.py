"""The benchmark of a step's cost without an engine: arguments, the turns of the engines, and its figures."""

from __future__ import annotations

import json

import pytest

from benchmarks.overhead import __main__ as command_line
from benchmarks.overhead import measure
from benchmarks.results.sections.cost import overhead_section, steering_overhead_section


class Engine:
    """Stands in for `Remote`: a stock step takes 1 ms, any other 1.5 ms; every start has one more compaction."""

    compacts = True

    def __init__(self, arm, shape, args, folder):
        self.arm, self.starts = arm, 0

    def call(self, method, *arguments):
        if method == "steps":
            return arguments[0] * (1e-3 if self.arm == "stock" else 1.5e-3)
        self.starts += 1
        return 8 * self.starts if self.compacts else 0

    def stop(self):
        pass


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(measure, "Remote", Engine)


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
def test_figures_without_compactions_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Engine, "compacts", False)
    out = tmp_path / "out.json"
    assert command_line.main([*WORDS, "--out", str(out)]) == 1
    assert "error: hardly any compaction took place" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "full"], "--policy full evicts nothing"),
        (["--buffer", "20"], "--buffer 20 must be a multiple of 16"),
        (["--budgets", "3900"], "--budgets 3900 is out of range; allowed: up to 3616"),
        (["--layers", "2"], "--layers and --hidden-size only go together"),
        (["--layers", "2", "--hidden-size", "100"], "--layers 2 --hidden-size 100 is out of range"),
        (["--steering", "--layers", "2", "--hidden-size", "256"], "--steering is measured on --model"),
    ],
)
def test_bad_arguments_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
