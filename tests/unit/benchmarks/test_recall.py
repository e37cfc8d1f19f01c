"""Recall without engines: places of facts, right answers, counting and resuming."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import recall
from benchmarks.recall import ask, describe, is_right, main
from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation.engine import Done, Scores
from skipkv_vllm.evaluation.texts import Text

BASE = 256


class Letters:
    """A tokenizer of single letters, with or without a chat template."""

    def __init__(self, chat_template: str | None = "yes") -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> Namespace:
        return Namespace(input_ids=[ord(letter) for letter in text])

    def __len__(self) -> int:
        return BASE

    def decode(self, tokens, **_) -> str:
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


TEXT = Text("a", 0, tuple(map(ord, "x" * 1000)))


@pytest.mark.parametrize("facts", [1, 2, 4])
def test_facts_are_told_once_and_asked_for(facts):
    questions = ask(TEXT, Letters(), facts)
    assert len(questions) == facts
    contexts = set()
    for question in questions:
        prompt = "".join(map(chr, question.prompt))
        context, _, rest = prompt.partition("\n\nWhat is")
        contexts.add(context)
        assert len(context) == 1000
        assert prompt.startswith("<user>x")
        assert rest.endswith("?<assistant>")
        assert prompt.count(f"is {question.code}.\n") == 1
        # Facts are in the first four fifths.
        assert context.index(question.code) < 900
        answer, score = question.requests
        assert "".join(map(chr, score.tokens)) == prompt + "".join(map(chr, question.answer)) + f" {question.code}"
        assert (answer.top, score.top) == (None, 0)
    assert len(contexts) == 1
    assert len({question.name for question in questions}) == facts
    assert ask(TEXT, Letters(), facts) == questions


def test_a_model_without_a_chat_is_asked_in_plain_words():
    (question,) = ask(TEXT, Letters(None), 1)
    prompt = "".join(map(chr, question.prompt))
    assert prompt.startswith("x")
    assert prompt.endswith("?\nAnswer:")
    assert chr(question.answer[0]) == " "


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The code is 4711.", True), ("4711", True), ("47112", False), ("14711", False), ("4 711", False), ("", False)],
)
def test_an_answer_is_right_if_it_has_the_value(answer, right):
    assert is_right("4711", answer) is right


class Engines:
    """Answers all questions but the first `wrong` rightly with full KV, and none under eviction."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.jobs = wrong, 0

    @contextlib.contextmanager
    def __call__(self, setup, group, log):
        yield self._answer

    def _answer(self, jobs):
        codes = {}
        for job in jobs:
            if job.top is not None:
                # The scored request ends with the value.
                codes[job.key.partition("-")[0]] = job.tokens[-5:]
        for job in jobs:
            self.jobs += 1
            full = job.method == "full"
            scores = None
            if job.top is not None:
                rows = len(job.tokens) - 1
                logprobs = np.full((rows, 1), -9.0, np.float32)
                logprobs[-5:] = -1.0 if full else -3.0
                scores = Scores(np.zeros((rows, 1), np.int32), logprobs)
            right = full and list(codes).index(job.key.partition("-")[0]) >= self.wrong
            yield Done(job.key, list(codes[job.key.partition("-")[0]]) if right else [], 0 if full else 2, scores)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(recall, "load_tokenizer", lambda _: Letters())
    words = ["--model", "m", "--methods", "rkv", "--questions", "8", "--kinds", "mathematics", "--out", str(tmp_path)]

    def run(engines, *further):
        return recall.run(recall._parser().parse_args([*words, *further]), engines)

    return run


def test_rows_compare_with_full_kv(run, tmp_path, capsys):
    engines = Engines(wrong=2)
    report = run(engines, "--ratio", "2", "4")
    full, half, quarter = report["rows"]
    assert (full["right"], full["questions"], full["counts"]) == (6, 8, True)
    assert [(row["budget"], row["right"]) for row in (half, quarter)] == [(500, 0), (250, 0)]
    assert full["logprob"] == pytest.approx(-1)
    assert half["logprob_to_full"] == pytest.approx([-2, -2, -2])
    low, high = full["interval"]
    assert 0.4 < low < 0.75 < high < 0.95
    assert json.loads((tmp_path / "recall.json").read_text())["rows"] == report["rows"]
    assert "6 of 8" in capsys.readouterr().out

    # A repetition finds all results; only new lengths run.
    done = engines.jobs
    assert run(engines, "--ratio", "2", "4")["rows"] == report["rows"]
    assert engines.jobs == done
    assert run(engines, "--ratio", "2", "4", "--lengths", "1000", "600")["rows"][:3] == report["rows"]
    assert engines.jobs == 2 * done


def test_a_length_that_full_kv_fails_does_not_count(run):
    report = run(Engines(wrong=3), "--ratio", "2")
    assert not any(row["counts"] for row in report["rows"])
    assert "length 1000 does not count: full KV is right in 5 of 8, below 65%" in describe(report["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--questions", "0"], "--questions 0 is out of range; allowed: at least 1"),
        (["--facts", "13"], "--facts 13 is out of range; allowed: 1 to 12"),
        (["--lengths", "150"], "--lengths 150 is out of range; allowed: at least 200"),
        (["--lengths", "300", "300"], "--lengths 300 300: give at least one value, and each once"),
        (["--kinds", "prose", "--lengths", "9000", "--questions", "9000"], "--questions 9000: there is text for"),
        (["--model", "./nothing"], "--model ./nothing: there is no such folder; give"),
        (["--ratio", "2", "2"], "--ratio 2 2: give at least one value, and each once"),
        (["--methods", "rkw"], "--methods='rkw' is unknown"),
    ],
)
def test_bad_input_names_field_and_remedy(tmp_path, capsys, words, message):
    given = ["--model", str(bundled_model()), "--questions", "2", "--lengths", "600", "--kinds", "mathematics"]
    assert main([*given, "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
