"""The bundled model's task: correct sums, values stated once, disjoint splits."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.tiny_reasoner.problems import DOUBTS, NUM_GIVENS, SPLITS, extract_answer, make_problem, problems
from benchmarks.tiny_reasoner.tokenizer import build_tokenizer
from skipkv_vllm import bundled_model

SAMPLE = list(problems("dev", 50))


def sentences(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n\n")


@pytest.mark.parametrize("problem", SAMPLE[:20], ids=lambda p: p.question.partition("What")[2])
def test_every_sum_is_right_and_the_question_is_answered(problem):
    value: dict[str, int] = {}
    rules = dict(re.findall(r"(\w) = (\w \+ \w)[,.]", problem.question.partition("Rules")[2]))
    for sentence in sentences(problem.thoughts):
        if found := re.fullmatch(r"Read (\w) = (\d) \+ (\d), so \1: (\d)\.", sentence):
            name, x, y, result = found.groups()
            assert f"{name} = {x} + {y}" in problem.question
            assert (int(x) + int(y)) % 10 == int(result)
            assert value.setdefault(name, int(result)) == int(result)
        elif found := re.fullmatch(r"Find (\w) = (\w): (\d) \+ (\w): (\d), so \1: (\d)\.", sentence):
            name, a, x, b, y, result = found.groups()
            assert rules[name] == f"{a} + {b}"
            assert (value[a], value[b]) == (int(x), int(y))
            assert (int(x) + int(y)) % 10 == int(result)
            assert name not in value, "a rule's value is found once"
            value[name] = int(result)
        elif found := re.fullmatch(r"Done, so (\w): (\d) \+ (\w): (\d) = (\d)\.", sentence):
            a, x, b, y, result = found.groups()
            assert problem.question.endswith(f"What is {a} + {b}?")
            assert (value[a], value[b]) == (int(x), int(y))
            assert (int(x) + int(y)) % 10 == int(result) == problem.answer
        else:
            assert f"{sentence}\n\n" in DOUBTS or re.fullmatch(r"So \w holds\.", sentence), sentence
    assert len(value) == NUM_GIVENS + len(rules)
    assert extract_answer(problem.completion) == problem.answer


def test_most_sentences_repeat_and_what_is_found_does_not():
    for problem in SAMPLE:
        said = sentences(problem.thoughts)
        assert len(set(said)) < len(said) / 4
        found = [s for s in said if s.startswith("Find")]
        assert len(set(found)) == len(found) == 4


def test_a_problem_follows_from_its_seed_and_doubts_are_optional():
    assert make_problem(7) == make_problem(7)
    assert make_problem(7) != make_problem(8)
    assert "Wait" not in make_problem(7, doubt=(0.0, 0.0)).thoughts
    assert make_problem(7).thoughts.count("Wait") == 4 * len(DOUBTS)


def test_splits_have_room_and_never_meet():
    ordered = sorted(SPLITS.values())
    assert all(b - a >= 1_000_000 for a, b in pairwise(ordered))
    # Training draws upwards from the largest, without end.
    assert SPLITS["train"] == ordered[-1]
    questions = [{p.question for p in problems(split, 200)} for split in SPLITS]
    assert sum(map(len, questions)) == len(set().union(*questions))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='test' is not one of: train, dev"):
        problems("test", 1)


def test_the_bundled_tokenizer_is_the_one_the_script_builds():
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    bundled = json.loads(Path(bundled_model(), "tokenizer.json").read_text())
    for part in ("model", "added_tokens", "decoder"):
        assert built[part] == bundled[part], part


def test_what_must_be_looked_up_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    for text in (" c:", " c =", " 7", " c", "Wait", "Read", "Find", ".\n\n", "?\n\n"):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
