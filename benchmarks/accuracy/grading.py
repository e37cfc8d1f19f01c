"""Judge answers with math-verify, and programs with lighteval's LiveCodeBench metric."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

from skipkv_vllm.steering.extraction.grading import Grade, grade_boxed, math_verify

from . import UsageError
from .tasks import Task

TEST_TIMEOUT = 6  # seconds per test of a program, as LiveCodeBench sets it
LIGHTEVAL = "0.13.0"


def grade(task: Task, text: str) -> Grade:
    """Judge an output, thoughts and all.

    Only what follows the thoughts counts, or the whole text where no `</think>` closes them. A mathematical
    answer must stand in `\\boxed{}`, as the prompt asks; the last one counts, so a cut-off output is not right
    by a number in its thoughts.

    Raises:
        KVPolicyError: math-verify is missing, or this is not the main thread (its time limits are signals).
        UsageError: lighteval is missing.
    """
    if task.kind == "code":
        return _grade_program(task.reference, text.rpartition("</think>")[2])
    return grade_boxed(task.reference, text)


def check_available(kind: str, allow_code_execution: bool) -> None:
    """Fail before anything is generated if the grader cannot run.

    Raises:
        KVPolicyError, UsageError: saying what to install, or that --allow-code-execution is missing.
    """
    if kind == "math":
        math_verify()
        return
    if not allow_code_execution:
        raise UsageError(
            "grading runs the programs that the model writes, on this machine and with your rights; "
            "use a container and add --allow-code-execution"
        )
    _lighteval()


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
