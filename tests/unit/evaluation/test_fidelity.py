"""Fidelity without engines: statistics, reading texts, resuming, and what makes a run fail."""

from __future__ import annotations

import contextlib
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.texts import KINDS, default_sources, repetitive, solutions
from skipkv_vllm import bundled_model
from skipkv_vllm.cli import main as skipkv
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation import RunError, command
from skipkv_vllm.evaluation.arms import Arm, budgets_of
from skipkv_vllm.evaluation.comparison import Positions, distance_bins, divergence, first_changed, summarise
from skipkv_vllm.evaluation.engine import Done, Job, Scores, Setup, with_fair_random
from skipkv_vllm.evaluation.fidelity import TOP, Fidelity
from skipkv_vllm.evaluation.store import Store
from skipkv_vllm.evaluation.texts import Source, Text, read_source, read_sources, take_in_turn
from skipkv_vllm.trace.files import Trace

MODEL = str(bundled_model())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


# ---- statistics


def scores_of(logits: np.ndarray, following: np.ndarray, top: int) -> Scores:
    """Return the scores that vLLM would return for logits `[rows, vocabulary]`."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)[:, :top]
    tokens = np.concatenate([following[:, None], best], axis=1)
    return Scores(tokens.astype(np.int32), np.take_along_axis(logprobs, tokens, 1).astype(np.float32))


def random_scores(seed: int, rows: int = 50, vocabulary: int = 40, top: int = 20) -> tuple[Scores, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(rows, vocabulary))
    return scores_of(logits, np.random.default_rng(0).integers(0, vocabulary, rows), top), logits


def test_nothing_changed_is_exactly_zero():
    scores, _ = random_scores(1)
    same = Positions.compare(scores, scores)
    assert (same.nll == same.full_nll).all()
    assert same.agrees.all()
    assert (same.divergence == 0).all()


def test_the_divergence_is_exact_over_a_whole_vocabulary():
    (full, a), (other, b) = random_scores(1, top=40), random_scores(2, top=40)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(divergence(full, other), (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_the_divergence_of_lists_is_that_of_merged_classes():
    (full, a), (other, b) = random_scores(1), random_scores(2)
    for row, found in enumerate(divergence(full, other)):
        p, q = (np.exp(x[row]) / np.exp(x[row]).sum() for x in (a, b))
        # Both contain the following token.
        known = set(full.tokens[row]) & set(other.tokens[row])
        rest = [i for i in range(len(p)) if i not in known]
        expected = sum(p[i] * np.log(p[i] / q[i]) for i in known)
        expected += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found <= (p * np.log(p / q)).sum() + 1e-5


def test_rows_count_from_the_first_compaction_on():
    # Token 20 is the first one computed on a compacted cache; its row predicts token 21.
    assert first_changed(100, 20) == 20
    # A text without a compacted prediction is compared as a whole.
    assert first_changed(21, 20) == 0
    assert first_changed(22, 20) == 20


def test_distances_start_over_at_every_compaction():
    assert distance_bins(20 + 8, 20, 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert distance_bins(128 + 128, 128, 128).tolist() == [i // 8 for i in range(128)]
    assert distance_bins(10, 20, 4).tolist() == []


def positions(excess: list[float], full: float = 1.0) -> Positions:
    nll = np.array([full + each for each in excess], np.float32)
    count = len(excess)
    return Positions(nll, np.full(count, full, np.float32), np.array(excess) == 0, nll - full)


def test_figures_are_means_over_texts():
    texts = [positions([0, 0, 0, 0, 0.5, 0.5, 1.0, 1.0]), positions([9, 9, 9, 9, 0, 0, 0.5, 0.5])]
    found = summarise(texts, ["a", "b"], [1, 3], bound=4, buffer=4)
    assert found["positions"] == 8
    assert found["excess"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["by_source"] == pytest.approx({"a": 0.75, "b": 0.25})
    assert found["agreement"] == pytest.approx((0 + 0.5) / 2)
    assert found["by_distance"] == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert found["compactions"] == 2
    low, high = found["excess_interval"]
    assert (low, high) == pytest.approx((0.25, 0.75))


def test_the_interval_is_of_paired_differences():
    # The texts differ far more than the methods.
    texts = [positions([0.1] * 8, full) for full in (1.0, 5.0, 9.0, 13.0)]
    low, high = summarise(texts, list("abcd"), [1] * 4, bound=4, buffer=4)["excess_interval"]
    assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-5)


# ---- texts


def test_documents_are_joined_and_cut(tokenizer):
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Wait, ", "\n\n", "So a = 1.")]
    stream = words[0] + words[1] + words[2]
    source = Source("s", ["Wait, ", "So a = 1."])
    length = len(stream) // 2
    found = source.texts(tokenizer, length)
    assert [list(text.tokens) for text in found] == [stream[:length], stream[length : 2 * length]]
    assert [text.name for text in found] == ["s#0", "s#1"]


def test_texts_begin_with_the_tokens_that_the_tokenizer_puts_in_front():
    class Bos:
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> Namespace:
            ids = [ord(letter) for letter in text]
            return Namespace(input_ids=[1] * add_special_tokens + ids)

        def __len__(self) -> int:
            return 200

    texts = Source("s", ["abcdefg"]).texts(Bos(), 4)
    assert [text.tokens for text in texts] == [(1, 97, 98, 99), (1, 100, 101, 102)]


def test_files_of_all_kinds_are_read(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("So a = 1.")
    rows = [{"text": "So a = 1."}, {"messages": [{"role": "user", "content": "What is a?"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    ints = [torch.tensor(values) for values in ([5, 6], [7], [], [])]
    empty = torch.zeros(0, 2, dtype=torch.int64)
    Trace(*ints[:2], ints[2], ints[2], [], ints[2], empty, empty, torch.zeros(0), {}).save(tmp_path / "c.safetensors")
    plain, lines, trace = (read_source(tmp_path / name, tokenizer) for name in ("a.txt", "b.jsonl", "c.safetensors"))
    assert plain._documents == ["So a = 1."]
    assert lines._documents[0] == "So a = 1."
    assert "What is a?" in lines._documents[1]
    assert list(trace._documents) == [[5, 6, 7]]


def test_line_breaks_of_unicode_do_not_end_a_json_line(tokenizer, tmp_path):
    rows = [{"text": "So a\u2028= 1.\x85"}, {"text": "So b = 2."}]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert read_source(tmp_path / "a.jsonl", tokenizer)._documents == [row["text"] for row in rows]


def test_files_of_the_same_name_are_different_sources(tokenizer, tmp_path):
    paths = [tmp_path / name for name in ("a/x/notes.txt", "b/x/notes.txt", "b/other.txt")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("So a = 1.")
    assert [source.name for source in read_sources(paths, tokenizer)] == [
        "a/x/notes.txt",
        "b/x/notes.txt",
        "other.txt",
    ]
    with pytest.raises(KVPolicyError, match=r"--texts .*other\.txt: is given twice; give each file once"):
        read_sources([*paths, paths[2]], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"{", "line 1: is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"answer": "x"}', 'line 2: has neither a "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1: has neither a "text"'),
        ("a.jsonl", b'{"text": ["x"]}', 'line 1: has neither a "text"'),
        ("a.jsonl", b'{"messages": "x"}', 'line 1: has neither a "text"'),
        ("a.safetensors", b"nothing", "is not a trace"),
    ],
)
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KVPolicyError, match=message):
        read_source(tmp_path / name, tokenizer)


def test_too_little_text_and_foreign_tokens_are_refused(tokenizer):
    with pytest.raises(KVPolicyError, match="less than one text of --length 50"):
        Source("s", ["So a = 1."]).texts(tokenizer, 50)
    with pytest.raises(KVPolicyError, match="token id 999999 is out of range; allowed: 0 to"):
        Source("s", [[1, 999999]]).texts(tokenizer, 2)


def test_texts_are_taken_in_turn_and_once(tokenizer):
    sources = [Source("a", [[1, 2, 3, 4, 5, 6]]), Source("b", [[7, 8]]), Source("c", [[3, 4]])]
    names = [text.name for text in take_in_turn(sources, tokenizer, 2, None)]
    assert names == ["a#0", "b#0", "c#0", "a#2"]
    assert [text.name for text in take_in_turn(sources, tokenizer, 2, 2)] == ["a#0", "b#0"]


def test_the_default_texts_are_there_and_stay_the_same():
    assert [source.name for source in default_sources()] == list(KINDS)
    assert all(len("".join(make())) > 50_000 for make in KINDS.values())
    assert repetitive(3) == repetitive(3) != repetitive(4)
    assert solutions(3) == solutions(3) != solutions(4)


def test_generated_calculations_are_right():
    text = repetitive(1) + solutions(1)
    formula = r"(?<![\w^(-])(?<![*+/-] )([(\d][\d ()*+/-]*[*+/-] [\d()]+) = (-?\d+)(?!\d|[./]\d| [*+/(-])"
    found = re.findall(formula, text)
    assert len(found) > 200
    for left, right in found:
        assert eval(left) == int(right), (left, right)


# ---- a run


class Engines:
    """Stands in for engines: random log probabilities by text, worse by `harm` for a method."""

    def __init__(self, harm: float = 0.1, compactions: int | None = None, stop_after: int = 10**9) -> None:
        self.harm, self.compactions, self.left = harm, compactions, stop_after
        self.jobs: list[Job] = []
        self.groups: list[list[str]] = []

    @contextlib.contextmanager
    def __call__(self, setup: Setup, group: list[str], log: Path):
        self.groups.append(list(group))
        yield lambda jobs: (self._done(setup, job) for job in jobs)

    def _done(self, setup: Setup, job: Job) -> Done:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.jobs.append(job)
        rows, bound = len(job.tokens) - 1, setup.bound(job.budget)
        rng = np.random.default_rng(sum(job.tokens))
        logprobs = -rng.random((rows, 1 + TOP), np.float32)
        tokens = np.tile(np.arange(1 + TOP, dtype=np.int32), (rows, 1))
        full = job.method == "full"
        if not full:
            logprobs[bound:, 0] -= np.float32(self.harm)
        count = 0 if full or len(job.tokens) <= bound else self.compactions
        return Done(job.key, [1], 1 if count is None else count, Scores(tokens, logprobs))


TEXTS = [Text("a", number, tuple(range(number, number + 60))) for number in range(3)]
SETUP = Setup("no-such-model", longest=61, buffer=8)


def test_what_is_missing_runs_and_full_kv_comes_first(tmp_path):
    engines = Engines()
    report = Fidelity(SETUP, ["rkv", "snapkv"], [20, 30], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs[:3]] == ["full"] * 3
    assert len(engines.jobs) == 3 * (1 + 2 * 2)
    assert engines.groups == [["rkv", "snapkv"]]
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    assert set(rows) == {("rkv", 20), ("snapkv", 20), ("rkv", 30), ("snapkv", 30)}
    assert rows["rkv", 20]["excess"] == pytest.approx(0.1, abs=1e-5)
    assert rows["rkv", 20]["positions"] == 3 * (59 - 28)

    # Everything is stored; only another method and budget run.
    assert Fidelity(SETUP, ["rkv", "snapkv"], [20, 30], TEXTS, tmp_path, engines)() == report
    assert len(engines.jobs) == 15
    Fidelity(SETUP, ["rkv", "tova"], [20, 40], TEXTS, tmp_path, engines)()
    assert [(job.method, job.budget) for job in engines.jobs[15:]] == [
        *[("tova", 20)] * 3,
        *[("rkv", 40)] * 3,
        *[("tova", 40)] * 3,
    ]


def test_an_interrupted_run_goes_on(tmp_path):
    engines = Engines(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    engines.left = 10**9
    report = Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert len(engines.jobs) == 6
    assert report == Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path / "other", Engines())()


def test_changed_arguments_are_noticed(tmp_path):
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()
    other = Setup("no-such-model", longest=61, buffer=16)
    with pytest.raises(KVPolicyError, match=r"--out .* holds results of other settings.*\n  buffer: was 8, is 16"):
        Fidelity(other, ["rkv"], [20], TEXTS, tmp_path, Engines())
    # Parameters of a method are part of its results.
    engines = Engines()
    Fidelity(Setup("no-such-model", 61, 8, configs={"rkv": {"mix": 0.5}}), ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs] == ["rkv"] * 3


def test_a_method_that_compacts_nothing_fails_the_run(tmp_path):
    with pytest.raises(RunError, match=r"rkv at 20 made no compaction of a#0.*60 tokens exceed budget \+ buffer = 28"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines(compactions=0))()
    # Its results are not stored.
    engines = Engines()
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, engines)()
    assert [job.method for job in engines.jobs] == ["rkv"] * 3


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(KVPolicyError, match=r"settings.json is damaged.*remove"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())


def test_a_budget_beyond_the_text_needs_no_compaction(tmp_path):
    report = Fidelity(SETUP, ["rkv"], [60], TEXTS, tmp_path, Engines(compactions=0, harm=9.0))()
    (row,) = report["rows"]
    assert row["excess"] == 0
    assert row["excess_interval"] == [0, 0]
    assert row["positions"] == 3 * 59
    assert row["by_distance"] == []


@pytest.mark.parametrize("damage", [lambda _: b"half", lambda whole: whole[:-30], lambda _: b""])
def test_a_damaged_result_is_named(tmp_path, damage):
    Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()
    result = next((tmp_path / "results" / "rkv-20").iterdir())
    result.write_bytes(damage(result.read_bytes()))
    with pytest.raises(KVPolicyError, match=r"rkv-20.*cannot be read.*remove it"):
        Fidelity(SETUP, ["rkv"], [20], TEXTS, tmp_path, Engines())()


def test_results_appear_in_one_piece(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(TypeError):
        store.save("a/b", {"x": 1, "file": 2})  # numpy accepts no array of that name
    assert "a/b" not in store


# ---- engines


def test_methods_share_an_engine_where_they_can():
    setup = Setup("m", 10, configs={"random": {"sinks": 4}, "rkv": {"mix": 0.5}})
    assert setup.groups(["skipkv", "rkv", "random", "h2o", "thinkv"]) == [
        ["rkv", "skipkv", "h2o", "thinkv"],
        ["random"],
    ]
    assert Setup("m", 10).groups(["skipkv", "rkv"]) == [["skipkv", "rkv"]]
    arguments = setup.engine_arguments(["rkv", "skipkv"])
    assert arguments["kv_policy_config"] == {"mix": 0.5}
    assert arguments["kv_request_policies"] == ["skipkv"]
    assert arguments["kv_protect_prompt"] is False
    assert arguments["enable_prefix_caching"] is False


def test_random_protects_the_beginning_of_a_text():
    assert with_fair_random(["rkv", "random"], {}) == {"random": {"sinks": 64}}
    assert with_fair_random(["random"], {"random": {"seed": 3}}) == {"random": {"sinks": 64, "seed": 3}}
    assert with_fair_random(["random"], {"random": {"sinks": 0}}) == {"random": {"sinks": 0}}
    assert with_fair_random(["rkv"], {}) == {}


# ---- the command line


def arguments(*words: str, out: Path) -> list[str]:
    return ["--model", MODEL, "--out", str(out), *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "skipkw"], "--methods='skipkw' is unknown; choose one of: full, "),
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
