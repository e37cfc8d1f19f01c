"""Grading: right, wrong, missing and cut-off answers, in the forms that models write."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks.accuracy import UsageError, grading
from benchmarks.accuracy.grading import check_available, grade
from benchmarks.accuracy.tasks import Task
from skipkv_vllm.core.errors import KVPolicyError


def math_task(reference: str) -> Task:
    return Task("t-0", [], reference, "math")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("7", "a is 3.</think>\n\nThe answer is \\boxed{7}."),
        ("7", "first \\boxed{8}, no: \\boxed{7}"),
        ("1205", "</think>\\boxed{1,205}"),
        ("540", "</think>\\boxed{\\$540}"),
        ("10", "\\boxed{10 \\text{ dollars}}"),
        ("\\frac{1}{2}", "\\boxed{0.5}"),
        ("\\frac{1}{2}", "\\boxed{\\dfrac12}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3,\\pi/2)}"),
        ("x^2+1", "\\boxed{1+x^2}"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
        ("025", "\\boxed{25}"),
    ],
)
def test_right_answers(reference, text):
    assert grade(math_task(reference), text).correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("</think>\\boxed{8}", "8"),
        ("\\boxed{7} is what I thought</think>\\boxed{8}", "8"),
        # Cut off: numbers in thoughts and half a box do not count as answers.
        ("so a: 7. Then b: 7", None),
        ("so $7$ it is", None),
        ("so $7$ it is, \\boxed{7", None),
        ("the answer is \\boxed{7}.</think>\n\n", None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_wrong_and_missing_answers(text, answer):
    assert grade(math_task("7"), text) == (answer, False)


def test_an_unreadable_reference_is_an_error():
    with pytest.raises(KVPolicyError, match="math-verify cannot read the reference answer"):
        grade(math_task(""), "\\boxed{1}")


def test_threads_are_refused():
    with ThreadPoolExecutor(1) as pool, pytest.raises(KVPolicyError, match="main thread"):
        pool.submit(grade, math_task("71"), "\\boxed{72}").result()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(KVPolicyError, match=r"pip install 'skipkv-vllm\[eval\]'"):
        check_available("math", False)


# ---- programs

CODE = Task(
    "t-0",
    [],
    json.dumps(
        {
            "public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]',
            "private_test_cases": '[{"input": "4 5", "output": "9", "testtype": "stdin"}]',
            "metadata": "{}",
        }
    ),
    "code",
)
RIGHT = "</think>\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\n"
WRONG = "</think>\n```python\nprint(3)\n```\n"


def test_running_programs_must_be_allowed():
    with pytest.raises(UsageError, match="--allow-code-execution"):
        check_available("code", False)


def test_lighteval_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lighteval", None)
    monkeypatch.setitem(sys.modules, "lighteval.tasks.tasks.lcb.codegen_metrics", None)
    with pytest.raises(UsageError, match="pip install --no-deps lighteval=="):
        check_available("code", True)


def test_all_tests_reach_the_metric(monkeypatch):
    seen = {}

    def codegen_metrics(samples, generations, **options):
        seen.update(json.loads(samples[0]["input_output"]), program=generations[0][0])
        return {"pass@1": 1.0}, None

    library = SimpleNamespace(extract_code=lambda text: text.split("```")[1], codegen_metrics=codegen_metrics)
    monkeypatch.setattr(grading, "_lighteval", lambda: library)
    assert grade(CODE, RIGHT).correct
    assert seen["inputs"] == ["1 2", "4 5"]
    assert seen["outputs"] == ["3", "9"]
    assert seen["fn_name"] is None
    assert "print(a + b)" in seen["program"]


@pytest.mark.parametrize(("text", "correct"), [(RIGHT, True), (WRONG, False), ("no program", False)])
def test_the_real_metric(text, correct):
    pytest.importorskip("lighteval", reason="pip install --no-deps lighteval==0.13.0")
    assert grade(CODE, text).correct == correct
