"""Problems and reasoning texts: JSON lines, or data sets on the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...core.errors import KVPolicyError

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        question: the user's message.
        answer: the correct answer; None if unknown.
    """

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class ReasoningText:
    """A response of a reasoning model.

    Attributes:
        prompt: text of the prompt, chat template included.
        response: text of the response, thoughts included.
        correct: whether the answer is right; None if unknown.
    """

    prompt: str
    response: str
    correct: bool | None = None


@dataclass(frozen=True)
class DataSet:
    """Training problems on the hub: repository, configuration, split, and how a row becomes a problem."""

    path: str
    config: str | None
    split: str
    fields: tuple[str, ...]
    problem: Callable[[Mapping[str, Any]], Problem]


def _boxed(question: str, answer: str) -> Problem:
    return Problem(f"{question}\n{BOXED}", answer)


# Only training problems, so that no test set leaks into a vector.
DATA_SETS = {
    # 12,000 problems of MATH: all except MATH-500.
    "math-train": DataSet(
        "nlile/hendrycks-MATH-benchmark",
        None,
        "train",
        ("problem", "answer"),
        lambda row: _boxed(row["problem"], row["answer"]),
    ),
    "gsm8k-train": DataSet(
        "openai/gsm8k",
        "main",
        "train",
        ("question", "answer"),
        lambda row: _boxed(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", "")),
    ),
}


def load_problems(name: str, first: int, count: int) -> list[Problem]:
    """Load problems `first` to `first + count` of a data set, or of a file with `question` and optionally `answer`.

    Raises:
        KVPolicyError: neither a known name nor a usable file, or too few problems.
    """
    if name in DATA_SETS:
        rows, found = _download(name, DATA_SETS[name]), [*DATA_SETS[name].fields]
        make = DATA_SETS[name].problem
    elif Path(name).is_file():
        rows, found = list(_read_lines(Path(name))), ["question"]
        make = _problem
    else:
        raise KVPolicyError(
            f"{name!r} is neither a data set ({', '.join(DATA_SETS)}) nor a file; give a file with one JSON object "
            'per line, like {"question": "What is 1 + 1?", "answer": "2"}'
        )
    chosen = rows[first : first + count]
    if len(chosen) < count:
        raise KVPolicyError(
            f"{name} has {len(rows)} problems, but {first + count} are needed; request fewer, or give more"
        )
    for number, row in enumerate(chosen, first + 1):
        if missing := [field for field in found if not isinstance(row.get(field), str)]:
            raise KVPolicyError(f"{name}, row {number} has no text named {' and '.join(missing)}; it has {list(row)}")
    return [make(row) for row in chosen]


def _problem(row: Mapping[str, Any]) -> Problem:
    answer = row.get("answer")
    return Problem(row["question"], None if answer is None else str(answer))


def _download(name: str, data: DataSet) -> list[dict[str, Any]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise KVPolicyError(
            f"{name} comes from the Hugging Face hub and needs the package `datasets`: pip install "
            "'skipkv-vllm[eval]', or give the problems as a file"
        ) from None
    try:
        return list(datasets.load_dataset(data.path, data.config, split=data.split))
    except Exception as error:  # the library's many layers raise errors of any kind
        raise KVPolicyError(
            f"{name}: could not load {data.path} ({type(error).__name__}: {error}); check the network, or give the "
            "problems as a file"
        ) from error


def read_texts(path: Path) -> list[ReasoningText]:
    """Read reasoning texts: one JSON object per line with `prompt`, `response` and optionally `correct`.

    Raises:
        KVPolicyError: no such file, an empty file, or a line that is not a reasoning text.
    """
    texts = []
    for number, row in enumerate(_read_lines(path), 1):
        correct = row.get("correct")
        if not (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)) or not (
            correct is None or isinstance(correct, bool)
        ):
            raise KVPolicyError(
                f"{path}, row {number} is not a reasoning text; it needs the strings prompt (with chat template) and "
                "response, and may have correct (true or false)"
            )
        texts.append(ReasoningText(row["prompt"], row["response"], correct))
    if not texts:
        raise KVPolicyError(f"{path} has no reasoning texts; give a file with one JSON object per line")
    return texts


def write_texts(path: Path, texts: Iterable[ReasoningText]) -> None:
    """Write a file for `read_texts`.

    Raises:
        KVPolicyError: the file cannot be written.
    """
    try:
        path.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts))
    except OSError as error:
        raise KVPolicyError(
            f"cannot write the reasoning texts {path} ({error.strerror}); choose another path"
        ) from None


def at_most_per_outcome(texts: Sequence[ReasoningText], limit: int) -> list[ReasoningText]:
    """Return the first `limit` right and the first `limit` wrong texts, in their order.

    Raises:
        KVPolicyError: a text whose outcome is unknown.
    """
    left = {True: limit, False: limit}
    chosen = []
    for text in texts:
        if text.correct is None:
            raise KVPolicyError(
                "--per-outcome needs texts that are known to be right or wrong; give answers, or drop it"
            )
        if left[text.correct] > 0:
            left[text.correct] -= 1
            chosen.append(text)
    return chosen


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # splitlines would also split at other line ends, which JSON does not escape.
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KVPolicyError(f"cannot read {path} ({error}); give a file with one JSON object per line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise KVPolicyError(f"{path}, line {number} is not JSON ({error}); give one JSON object per line") from None
        if not isinstance(row, dict):
            raise KVPolicyError(f"{path}, line {number} is JSON but not an object; give one JSON object per line")
        yield row
