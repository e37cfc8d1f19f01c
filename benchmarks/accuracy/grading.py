"""Is the answer right? Judged by math-verify, and for programs by lighteval's LiveCodeBench metric."""

from __future__ import annotations

import functools
import importlib
import json
import threading
from types import ModuleType
from typing import NamedTuple

from . import UsageError
from .tasks import Task

TIMEOUT = 5  # seconds for parsing and for each comparison
TEST_TIMEOUT = 6  # seconds per test of a program, as LiveCodeBench sets it
LIGHTEVAL = "0.13.0"


class Grade(NamedTuple):
    """What was found in an output and whether it is right.

    Attributes:
        answer: the answer as written; None where there is none.
        correct: whether it is right.
    """

    answer: str | None
    correct: bool


def grade(task: Task, text: str) -> Grade:
    """Judge an output, thoughts and all.

    Only what follows the thoughts counts, or the whole text where no `</think>` closes them. A mathematical
    answer must stand in `\\boxed{}`, as the prompt asks; the last one counts, so a cut-off output is not right
    by a number in its thoughts.

    Raises:
        UsageError: the library is missing, or this is not the main thread (its time limits are signals).
    """
    tail = text.rpartition("</think>")[2]
    return _grade_program(task.reference, tail) if task.kind == "code" else _grade_boxed(task.reference, tail)


def check_available(kind: str, allow_code_execution: bool) -> None:
    """Fail before anything is generated where the grader could not run.

    Raises:
        UsageError: saying what to install, or that --allow-code-execution is missing.
    """
    if kind == "math":
        _math_verify()
        return
    if not allow_code_execution:
        raise UsageError(
            "grading runs the programs that the model writes, on this machine and with your rights; "
            "use a container and add --allow-code-execution"
        )
    _lighteval()


def _grade_boxed(reference: str, tail: str) -> Grade:
    start = max(tail.rfind("\\boxed"), tail.rfind("\\fbox"))
    return Grade(None, False) if start < 0 else _compare(reference, tail[start:])


@functools.lru_cache(maxsize=100_000)
def _compare(reference: str, boxed: str) -> Grade:
    library = _math_verify()
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("math-verify limits its time by signals, so answers are graded in the main thread only")
    how = [library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    gold = library.parse(f"\\boxed{{{reference}}}", how, parsing_timeout=TIMEOUT)
    if not gold:
        raise UsageError(f"the reference answer {reference!r} is nothing that math-verify can read")
    found = library.parse(boxed, how, parsing_timeout=TIMEOUT)
    if not found:
        return Grade(None, False)
    return Grade(str(found[-1]), bool(library.verify(gold, found, timeout_seconds=TIMEOUT)))


def _math_verify() -> ModuleType:
    try:
        return importlib.import_module("math_verify")
    except ImportError:
        raise UsageError("grading needs the package math-verify: pip install 'skipkv-vllm[eval]'") from None


def _grade_program(tests: str, tail: str) -> Grade:
    library = _lighteval()
    program = library.extract_code(tail)
    if not program.strip():
        return Grade(None, False)
    row = json.loads(tests)
    cases = json.loads(row["public_test_cases"])
    try:
        cases += json.loads(row["private_test_cases"])
    except json.JSONDecodeError:
        cases += library.translate_private_test_cases(row["private_test_cases"])
    sample = {
        "inputs": [case["input"] for case in cases],
        "outputs": [case["output"] for case in cases],
        "fn_name": json.loads(row["metadata"] or "{}").get("func_name"),
    }
    metrics, _ = library.codegen_metrics(
        [{"input_output": json.dumps(sample)}], [[program]], k_list=[1], num_process_evaluate=1, timeout=TEST_TIMEOUT
    )
    return Grade(program, bool(metrics["pass@1"] == 1.0))


def _lighteval() -> ModuleType:
    try:
        return importlib.import_module("lighteval.tasks.tasks.lcb.codegen_metrics")
    except ImportError:
        # With its dependencies lighteval would replace this environment's torch; the metric needs none of them.
        raise UsageError(
            f"grading programs needs lighteval's LiveCodeBench metric: pip install --no-deps lighteval=={LIGHTEVAL}"
        ) from None
