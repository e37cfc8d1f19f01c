"""Grade boxed answers with math-verify."""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType
from typing import NamedTuple

from ...core.errors import KVPolicyError

TIMEOUT = 5
"""seconds for parsing and for each comparison"""


class Grade(NamedTuple):
    """The answer found in an output.

    Attributes:
        answer: the answer as written; None if there is none.
        correct: whether it is right.
    """

    answer: str | None
    correct: bool


def grade_boxed(reference: str, text: str) -> Grade:
    r"""Grade the last `\boxed{}` after the thoughts of an output, or in the whole text if `</think>` is missing.

    Raises:
        KVPolicyError: math-verify is not installed or cannot read the reference, or this is not the main thread
            (math-verify limits its time with signals).
    """
    tail = text.rpartition("</think>")[2]
    start = max(tail.rfind("\\boxed"), tail.rfind("\\fbox"))
    return Grade(None, False) if start < 0 else _compare(reference, tail[start:])


@functools.lru_cache(maxsize=100_000)
def _compare(reference: str, boxed: str) -> Grade:
    library = math_verify()
    if threading.current_thread() is not threading.main_thread():
        raise KVPolicyError(
            "math-verify limits its time with signals, so answers can only be graded in the main thread"
        )
    how = [library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    gold = library.parse(f"\\boxed{{{reference}}}", how, parsing_timeout=TIMEOUT)
    if not gold:
        raise KVPolicyError(f"math-verify cannot read the reference answer {reference!r}")
    found = library.parse(boxed, how, parsing_timeout=TIMEOUT)
    if not found:
        return Grade(None, False)
    return Grade(str(found[-1]), bool(library.verify(gold, found, timeout_seconds=TIMEOUT)))


def math_verify() -> ModuleType:
    """Import math-verify.

    Raises:
        KVPolicyError: it is not installed.
    """
    try:
        return importlib.import_module("math_verify")
    except ImportError:
        raise KVPolicyError("grading needs the package math-verify: pip install 'skipkv-vllm[eval]'") from None
