"""The command line of the fidelity evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skipkv_vllm.cli import main as skipkv
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation import RunError, command
from skipkv_vllm.evaluation.arms import Arm, budgets_of
from tests.unit.evaluation.fakes import MODEL, Engines


def arguments(*words: str, out: Path) -> list[str]:
    return ["--model", MODEL, "--out", str(out), *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "skipkw"], "--methods='skipkw' is unknown; did you mean 'skipkv'? Choose one of: full, "),
        (["--methods", "full"], "--methods: full is always measured; leave it out"),
        (["--methods", "rkv", "rkv"], "--methods rkv rkv: give at least one value, and each once"),
        (["--ratio", "0.5"], "--ratio 0.5 is out of range; allowed: at least 1"),
        (["--ratio", "4", "2", "4"], "--ratio 4 2 4: give at least one value, and each once"),
        (["--ratio", "4", "3.999"], "--ratio: budget 100 100: give at least one value, and each once"),
        (["--ratio", "100"], "rkv: --ratio: budget=4 is out of range; allowed: at least 9"),
        (["--budgets", "40", "40"], "--budgets 40 40: give at least one value, and each once"),
        (["--budgets", "4"], "rkv: --budgets=4 is out of range; allowed: at least 9"),
        (["--methods", "random", "--budgets", "40"], "allowed: at least 73 (window of 8 tokens + 64 sinks + 1)"),
        (["--length", "3"], "--length 3 is out of range; allowed: at least 16"),
        (["--max-texts", "0"], "--max-texts 0 is out of range; allowed: at least 1"),
        (["--num-seqs", "0"], "--num-seqs 0 is out of range"),
        (["--buffer", "0"], "kv_buffer=0"),
        (["--policy-config", '{"tova": {}}'], "--policy-config: tova is not one of --methods rkv"),
        (
            ["--methods", "trimkv"],
            """--methods trimkv: needs the gates of --model; add --policy-config '{"trimkv": {""",
        ),
        (["--policy-config", '{"rkv": 3}'], "--policy-config: 'rkv': 3 is not an object"),
        (["--policy-config", '{"rkv": {"mux": 1}}'], "'mux' is not a parameter of policy 'rkv'"),
        (["--policy-config", "{"], "--policy-config"),
        (["--engine", "[]"], "--engine"),
        (["--length", "100000"], "less than one text of --length 100000"),
        (["--model", "./no-such-folder"], "--model ./no-such-folder: there is no such folder"),
    ],
)
def test_bad_input_names_field_and_remedy(tmp_path, capsys, words, message):
    (tmp_path / "text.txt").write_text("So a = 1. " * 400)
    given = ["--methods", "rkv", "--length", "400", "--texts", str(tmp_path / "text.txt")]
    assert command.main("skipkv fidelity", arguments(*given, *words, out=tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def run_command(tmp_path: Path, engines: Any, *words: str) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("So a = 1. " * 400)
    given = ["--methods", "rkv", "random", "--ratio", "2", "4", "--length", "400", "--max-texts", "3"]
    words = (*arguments(*given, out=tmp_path / "out"), "--texts", str(tmp_path / "text.txt"), *words)
    return command.run(command.make_parser("p").parse_args(words), ["p", *words], serve=engines)


def test_the_report_says_what_was_run(tmp_path, capsys):
    report = run_command(tmp_path, Engines())
    shown = capsys.readouterr().out
    assert "rkv" in shown
    assert "0.1000" in shown
    assert json.loads((tmp_path / "out/fidelity.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out/fidelity.svg").stat().st_size > 1000
    assert report["settings"]["policy_config"] == {"random": {"sinks": 64}}
    assert report["settings"]["budgets"] == [200, 100]
    assert report["command"][0] == "p"
    assert {"commit", "machine", "versions"} <= set(report)


def test_a_section_of_the_results_is_made_of_the_report(tmp_path):
    from benchmarks.results.sections.fidelity import fidelity_section

    text = "\n\n".join(fidelity_section(run_command(tmp_path, Engines())))
    assert "| rkv | 100 |" in text
    assert "`random` protects the first 64 tokens." in text
    assert "| method | budget | text.txt |" in text


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("x"), 1), (KVPolicyError("x"), 2), (KeyboardInterrupt(), 130), (None, 0)]
)
def test_exit_statuses(error, status, capsys):
    def action() -> None:
        if error is not None:
            raise error

    assert command.guarded("p", action) == status
    assert ("run the same command again to resume" in capsys.readouterr().err) == (status == 130)


def test_it_is_a_command_of_skipkv(capsys):
    with pytest.raises(SystemExit) as stopped:
        skipkv(["fidelity", "--model", MODEL, "--texts", "no-such-file", "--ratio", "4", "8", "--length", "600"])
    assert stopped.value.code == 2
    assert "--texts no-such-file: there is no such file" in capsys.readouterr().err


def test_budgets_from_ratios():
    assert budgets_of([4, 8, 2.5], 1000) == [250, 125, 400]
    assert str(Arm("rkv", 12)) == "rkv at 12"
