"""Split a chain of thought into thoughts and classify each as execution, reflection or transition.

A thought is the text between two tokens that hold a blank line. It is attributed to the token *before* it, at which the
model decides what to do next (SEAL, arXiv 2504.07986).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from ...core.errors import KVPolicyError
from ...sentences import Tokenizer
from ..tables import THINK_END, THINK_START

Label = Literal["execution", "reflection", "transition"]
LABELS: tuple[Label, ...] = ("execution", "reflection", "transition")


@dataclass(frozen=True)
class KeywordSet:
    """Regular expressions that classify thoughts; they are searched in the stripped text, ignoring case.

    Attributes:
        name: recorded in the vector file.
        reflection, transition: tried in this order.
        execution: tried last; a thought that matches nothing has no class. None: every other thought is execution.
    """

    name: str
    reflection: re.Pattern[str]
    transition: re.Pattern[str]
    execution: re.Pattern[str] | None = None

    def label(self, thought: str) -> Label | None:
        """Return the class of a thought; None if it has none, e.g. because it is empty."""
        text = thought.strip()
        if not text:
            return None
        if self.reflection.search(text):
            return "reflection"
        if self.transition.search(text):
            return "transition"
        if self.execution is None or self.execution.search(text):
            return "execution"
        return None


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    # Without patterns, match nothing.
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)", re.IGNORECASE)


# SEAL's lists, its misspelling included.
_ANOTHER = "another (?:way|approach|method|solution|strategy|technique)"
KEYWORD_SETS = {
    "seal": KeywordSet(
        "seal",
        _any_of(
            [
                "^wait",
                "verify",
                "make sure",
                "hold on",
                "think again",
                "'s correct",
                "'s incorrect",
                "let me check",
                "seems right",
            ]
        ),
        _any_of(["^alternatively", "think differenly", _ANOTHER]),
    ),
    # The words by which SkipKV classifies sentences.
    "skipkv": KeywordSet("skipkv", _any_of([r"\bwait\b", r"\bagain\b"]), _any_of([r"\balternatively\b"])),
}


def load_keywords(name: str) -> KeywordSet:
    """Load a keyword set by its name or from a JSON file.

    The file holds an object with lists of regular expressions: `reflection`, `transition` and optionally `execution`.

    Raises:
        KVPolicyError: neither a known name nor a usable file.
    """
    if name in KEYWORD_SETS:
        return KEYWORD_SETS[name]
    path = Path(name)
    if not path.is_file():
        raise KVPolicyError(
            f"keywords={name!r} is neither {' nor '.join(map(repr, KEYWORD_SETS))} nor a file; give one of them, or "
            'a JSON file like {"reflection": ["^wait"], "transition": ["^alternatively"]}'
        )
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KVPolicyError(f"keywords {path} cannot be read as JSON ({error})") from None
    if not isinstance(lists, dict) or not {"reflection", "transition"} & lists.keys() or lists.keys() - set(LABELS):
        raise KVPolicyError(
            f"keywords {path} must be an object with lists named reflection, transition and, optionally, execution; "
            "at least one of the first two"
        )
    patterns = {}
    for label, values in lists.items():
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
            raise KVPolicyError(f"keywords {path}: {label} must be a list of regular expressions, not {values!r}")
        try:
            patterns[label] = _any_of(values)
        except re.error as error:
            raise KVPolicyError(
                f"keywords {path}: {label} {values!r} is not a valid regular expression ({error})"
            ) from None
    nothing = _any_of([])
    written = json.dumps(lists, sort_keys=True)
    return KeywordSet(
        written, patterns.get("reflection", nothing), patterns.get("transition", nothing), patterns.get("execution")
    )


class Thought(NamedTuple):
    """A thought.

    Attributes:
        boundary: index in the response's token ids of the token before it.
        text: its text.
    """

    boundary: int
    text: str


def thoughts(prompt: str, response: Sequence[int], tokenizer: Tokenizer, splits: frozenset[int]) -> list[Thought]:
    """Find the thoughts of a response that have a boundary before them. Text after `</think>` is not a thought.

    Args:
        prompt: text of the prompt, which may already contain `<think>`.
        response: token ids.
        tokenizer: tokenizer of the ids.
        splits: `split_tokens` of the tokenizer.

    Raises:
        KVPolicyError: neither the prompt nor the response opens the thoughts.
    """
    ids = list(response)
    start = _find(ids, tokenizer.encode(THINK_START, add_special_tokens=False))
    if start is None:
        if prompt.rfind(THINK_START) <= prompt.rfind(THINK_END):
            raise KVPolicyError(
                f"neither the prompt nor the response opens the thoughts with {THINK_START}; use a reasoning model, "
                "with its chat template"
            )
        start = 0
    end = _find(ids, tokenizer.encode(THINK_END, add_special_tokens=False), start)
    end = len(ids) if end is None else end
    cuts = [i for i in range(start, end) if ids[i] in splits]
    return [Thought(a, tokenizer.decode(ids[a + 1 : b + 1])) for a, b in pairwise([*cuts, end - 1])]


def _find(ids: list[int], wanted: list[int], start: int = 0) -> int | None:
    return next((i for i in range(start, len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted), None)
