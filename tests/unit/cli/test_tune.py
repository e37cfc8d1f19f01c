"""`skipkv tune` without engines: halves, the choice, the command line it prints, and how a run ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from skipkv_vllm.cli import main as skipkv
from skipkv_vllm.cli import tune
from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation.arms import Arm
from skipkv_vllm.evaluation.command import guarded
from skipkv_vllm.evaluation.engine import Done, Job, Setup, with_fair_random
from skipkv_vllm.evaluation.texts import Text
from skipkv_vllm.integration.compat.flags import update_arguments
from tests.unit.evaluation.fakes import MODEL, Engines
from tests.unit.repository.test_deployment import serve_parser  # noqa: F401

# ---- halves


def texts_of(**counts: int) -> list[Text]:
    """Texts in the order of `take_in_turn`."""
    rows = range(max(counts.values()))
    return [Text(name, row, (ord(name), row)) for row in rows for name, count in counts.items() if row < count]


def test_both_halves_have_every_kind_of_text():
    choosing, reporting = tune.halves(texts_of(a=3, b=3, c=2), 100)
    assert [text.name for text in choosing] == ["a#0", "a#2", "b#1", "c#0"]
    assert [text.name for text in reporting] == ["a#1", "b#0", "b#2", "c#1"]


@pytest.mark.parametrize("counts", [{"a": 4}, {"a": 9}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 4, "c": 7}])
def test_every_text_is_in_one_half(counts):
    texts = texts_of(**counts)
    halves = tune.halves(texts, 100)
    assert sorted(text.name for half in halves for text in half) == sorted(text.name for text in texts)
    assert len(halves[0]) - len(halves[1]) in (0, 1)


def test_too_few_texts_are_refused():
    with pytest.raises(KVPolicyError, match=r"there are 3 different texts of --length 100; at least 4.*smaller --len"):
        tune.halves(texts_of(a=3), 100)


# ---- the choice


def row(name: str, excess: float, high: float, memory: int) -> dict[str, Any]:
    return {
        "method": name,
        "excess": excess,
        "excess_interval": [0.0, high],
        "request_bytes": memory,
        "request_bytes_full": 100,
    }


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("small", 0.01, 0.04, 20), row("good", 0.0, 0.01, 40)], "small"),
        ([row("uncertain", 0.01, 0.06, 20), row("sure", 0.04, 0.05, 40)], "sure"),
        ([row("worse", 0.02, 0.03, 20), row("better", 0.01, 0.04, 20)], "better"),
        ([row("dear", 0.01, 0.02, 100)], None),
        ([row("bad", 0.2, 0.3, 20)], None),
    ],
    ids=["memory", "upper end", "tie", "saves nothing", "beyond"],
)
def test_the_least_memory_within_the_limit_is_chosen(rows, chosen):
    found = tune.choose(rows, 0.05)
    assert (found and found["method"]) == chosen


# ---- the line


@pytest.mark.parametrize(
    ("method", "setup"),
    [
        ("skipkv", Setup("m", 100)),
        ("random", Setup("m", 100, configs=with_fair_random(["random"], {}))),
        ("rkv", Setup("m", 100, 64, 16, "sentence", {"rkv": {"mix": 0.5}})),
        ("finch", Setup("m", 100, configs={"finch": {"task_tokens": 4}})),
    ],
)
def test_the_line_serves_the_policy_that_was_measured(method, setup, serve_parser):  # noqa: F811
    config = tune.config_of(setup, Arm(method, 96))
    measured = setup.policy_arguments([method]) | {"kv_budget": 96}
    words = shlex.split(tune.serve_line("my model", config, {}))
    assert words[:3] == ["vllm", "serve", "my model"]
    arguments = update_arguments(serve_parser.parse_args(words[2:]))
    served = KVPolicyConfig.parse(arguments.additional_config[CONFIG_KEY])
    assert {name: getattr(served, name) for name in measured} == measured
    assert served == config


def test_the_line_has_what_was_given_to_the_engine(serve_parser):  # noqa: F811
    server = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 7,
        "hf_overrides": {"rope_theta": 1e6},
        "tokenizer": None,
        "served_model_name": ["a", "b"],
    }
    config = KVPolicyConfig(kv_policy="skipkv")
    arguments = serve_parser.parse_args(shlex.split(tune.serve_line(MODEL, config, server))[2:])
    found = {name: getattr(arguments, name) for name in server}
    assert found == server


# ---- a run


class Graded(Engines):
    """Engines whose harm depends on method, budget and half."""

    def __init__(self, harms: dict[str, float], reporting: float = 1.0) -> None:
        super().__init__()
        self.harms, self.reporting = harms, reporting

    def _done(self, setup: Setup, job: Job) -> Done:
        factor = self.reporting if len(self.groups) > 1 else 1.0
        self.harm = self.harms.get(f"{job.method}-{job.budget}", 0) * factor
        return super()._done(setup, job)


HARMS = {"snapkv-200": 0.01, "random-200": 0.02, "snapkv-100": 0.04, "random-100": 0.2}


def start(tmp_path: Path, engines: Any, *words: str) -> tuple[int, dict[str, Any]]:
    (tmp_path / "text.txt").write_text(" ".join(f"So a = {number}." for number in range(800)))
    given = ["--methods", "snapkv", "random", "--ratio", "2", "4", "--length", "400", "--max-texts", "6"]
    words = ("--model", MODEL, "--texts", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *given, *words)
    args = tune.make_parser("p").parse_args(words)
    status = guarded("p", lambda: tune.run(args, ["p", *words], serve=engines))
    path = tmp_path / "out/tune.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


def test_one_half_chooses_and_the_other_reports(tmp_path, capsys):
    engines = Graded(HARMS)
    status, report = start(tmp_path, engines)
    assert status == 0
    assert (report["chosen"]["method"], report["chosen"]["budget"]) == ("snapkv", 100)
    assert report["chosen"]["excess"] == pytest.approx(0.04, abs=1e-5)
    assert report["reported"]["texts"] == report["settings"]["texts"] == 3
    assert not set(report["settings"]["digests"]) & set(report["settings"]["reporting_digests"])
    # The reporting half is measured for the chosen arm only.
    assert len(engines.jobs) == 3 * 5 + 3 * 2
    assert engines.groups == [["random", "snapkv"], ["snapkv"]]
    words = shlex.split(report["serve"])
    assert words[:7] == ["vllm", "serve", MODEL, "--kv-policy", "snapkv", "--kv-budget", "100"]
    shown = capsys.readouterr().out
    assert report["serve"] in shown
    assert "within the limit of 0.05" in shown
    # With the default memory.
    assert "requests fit at once" not in shown
    assert "capacity" not in report
    assert "fit" not in report["chosen"]
    assert (tmp_path / "out/tune.svg").stat().st_size > 1000

    assert start(tmp_path, engines)[0] == 0
    assert len(engines.jobs) == 21


def test_requests_that_fit_are_those_of_the_plan(tmp_path, capsys):
    words = ("--gpu-memory", "2", "--request-length", "1000", "--max-num-seqs", "16", "--max-model-len", "1200")
    status, report = start(tmp_path, Graded(HARMS), *words, "--engine", '{"dtype": "float32"}')
    assert status == 0
    shown = capsys.readouterr().out
    plan = ["plan", "--model", MODEL, "--dtype", "float32", "--no-kv-protect-prompt", "--kv-policy", "snapkv"]
    plan += ["--kv-budget", "100", "--gpu-memory", "2", "--length", "1000", "--max-num-seqs", "16"]
    with pytest.raises(SystemExit, match="0"):
        skipkv([*plan, "--max-model-len", "1200"])
    assert capsys.readouterr().out.strip() in shown
    assert f"{report['capacity']['fit']:,} such requests fit at once" in shown
    assert report["chosen"]["fit"] == report["capacity"]["fit"] > report["capacity"]["fit_full"]
    assert {"--max-num-seqs", "--max-model-len", "--dtype"} <= set(shlex.split(report["serve"]))


def test_the_line_keeps_the_sinks_of_random(tmp_path):
    _, report = start(tmp_path, Graded(HARMS), "--methods", "random")
    assert report["chosen"]["budget"] == 200
    assert """--kv-policy-config '{"sinks": 64}'""" in report["serve"]


@pytest.mark.parametrize(
    ("harms", "reporting", "words", "message"),
    [
        (HARMS, 1, ["--max-excess", "0.001"], "The best is snapkv at 200 with an excess of 0.0100, up to 0.0100"),
        (
            HARMS,
            2,
            [],
            "the chosen candidate exceeds --max-excess 0.05 on the other half of the texts: its excess there is 0.0800",
        ),
        (HARMS, 1, ["--request-length", "200"], "saves memory for a request of 200 tokens"),
    ],
)
def test_a_limit_that_is_not_held_is_said_and_ends_with_3(tmp_path, capsys, harms, reporting, words, message):
    status, report = start(tmp_path, Graded(harms, reporting), *words)
    assert status == 3
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(report["rows"]) == 4
    assert (tmp_path / "out/tune.svg").exists()
    assert ("NOT within" in printed.out) == ("other half" in message) == bool(report["chosen"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-excess", "0"], "--max-excess 0 is out of range; allowed: above 0"),
        (["--max-excess", "nan"], "--max-excess nan is out of range"),
        (["--max-texts", "3"], "there are 3 different texts of --length 400; at least 4 are needed"),
        (["--ratio", "1.3"], "a budget of 307 tokens (--budgets, --ratio) is out of range; allowed: up to 270"),
        (["--weight-memory", "3"], "--weight-memory is given without --gpu-memory"),
        (["--request-length", "9999999"], "a request's length of 9999999 tokens is out of range; allowed: 1 to"),
        (["--gpu-memory", "0"], "--gpu-memory 0 is out of range; allowed: above 0"),
        (["--gpu-memory", "1.09"], "blocks of 16 tokens are left for KV"),
        (["--engine", '{"dtype": "float8"}'], "--dtype float8 is unknown"),
        (["--engine", '{"block_size": "16"}'], "--engine: block_size is '16'; allowed: a number"),
        (["--engine", '{"max_model_len": "auto"}'], "--engine: max_model_len is 'auto'; allowed: a number"),
        (["--engine", '{"dtype": 3}'], "--engine: dtype is 3; allowed: a string"),
        (["--engine", '{"kv_budget": 64, "model": "x"}'], "--engine: kv_budget, model cannot be set here"),
        (["--out", __file__], f"--out {__file__}: the folder cannot be created (File exists); choose another path"),
        (["--methods", "full"], "--methods: full is always measured"),
    ],
)
def test_bad_input_is_noticed_before_anything_is_measured(tmp_path, capsys, words, message):
    engines = Graded({})
    assert start(tmp_path, engines, *words) == (2, {})
    assert message in capsys.readouterr().err
    assert not engines.jobs


def test_it_is_a_command_of_skipkv(capsys):
    with pytest.raises(SystemExit) as stopped:
        skipkv(["tune", "--model", MODEL, "--texts", "no-such-file", "--ratio", "4", "8", "--length", "600"])
    assert stopped.value.code == 2
    assert "--texts no-such-file: there is no such file" in capsys.readouterr().err


def test_the_help_names_both_groups_of_options(capsys):
    with pytest.raises(SystemExit):
        tune.make_parser("p").parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "--max-excess" in shown
    assert "--granularity" in shown
