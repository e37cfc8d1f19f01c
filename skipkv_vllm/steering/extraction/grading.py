"""Is a boxed answer right? Judged by math-verify."""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType
from typing import NamedTuple

from ...core.errors import KVPolicyError

TIMEOUT = 5  # seconds for parsing and for each comparison


class Grade(NamedTuple):
    """What was found in an output and whether it is right.

    Attributes:
        answer: the answer as written; None where there is none.
        correct: whether it is right.
    """

    answer: str | None
    correct: bool


def grade_boxed(reference: str, text: str) -> Grade:
    r"""Judge the last `\boxed{}` of an output after its thoughts, or of the whole text where `</think>` is missing.

    Raises:
        KVPolicyError: math-verify is missing or cannot read the reference, or this is not the main thread (its time
            limits are signals).
    """
    tail = text.rpartition("</think>")[2]
    start = max(tail.rfind("\\boxed"), tail.rfind("\\fbox"))
    return Grade(None, False) if start < 0 else _compare(reference, tail[start:])


@functools.lru_cache(maxsize=100_000)
def _compare(reference: str, boxed: str) -> Grade:
    library = math_verify()
    if threading.current_thread() is not threading.main_thread():
        raise KVPolicyError("math-verify limits its time by signals, so answers are graded in the main thread only")
    how = [library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    gold = library.parse(f"\\boxed{{{reference}}}", how, parsing_timeout=TIMEOUT)
    if not gold:
        raise KVPolicyError(f"the reference answer {reference!r} is nothing that math-verify can read")
    found = library.parse(boxed, how, parsing_timeout=TIMEOUT)
    if not found:
        return Grade(None, False)
    return Grade(str(found[-1]), bool(library.verify(gold, found, timeout_seconds=TIMEOUT)))


def math_verify() -> ModuleType:
    """The library.

    Raises:
        KVPolicyError: it is not installed.
    """
    try:
        return importlib.import_module("math_verify")
    except ImportError:
        raise KVPolicyError("grading needs the package math-verify: pip install 'skipkv-vllm[eval]'") from None
