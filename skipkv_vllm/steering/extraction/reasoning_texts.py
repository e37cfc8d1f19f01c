"""Problems to think about and traces of thinking: JSON lines, or data sets of the Hugging Face hub."""

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
        answer: the true answer; None where nobody knows.
    """

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Trace:
    """What a model wrote.

    Attributes:
        prompt: text that went in, chat template and all.
        response: text that came out, thoughts and all.
        correct: whether the answer is right, None where unknown.
    """

    prompt: str
    response: str
    correct: bool | None = None


@dataclass(frozen=True)
class DataSet:
    """Training problems of the hub: repository, configuration, split, and how a row becomes a problem."""

    path: str
    config: str | None
    split: str
    fields: tuple[str, ...]
    problem: Callable[[Mapping[str, Any]], Problem]


def _boxed(question: str, answer: str) -> Problem:
    return Problem(f"{question}\n{BOXED}", answer)


# Vectors are made of training problems only, so that no test set leaks into them.
DATA_SETS = {
    # 12,000 problems of MATH: all but the 500 of MATH-500.
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
    """Problems `first` to `first + count` of a data set, or of a file with `question` and, optionally, `answer`.

    Raises:
        KVPolicyError: neither a name nor a usable file, or too few problems.
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
            f"{name} has {len(rows)} problems, but {first + count} are needed; ask for fewer, or give more"
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
    except Exception as error:  # of any kind, by the library's many layers
        raise KVPolicyError(
            f"{name}: could not load {data.path} ({type(error).__name__}: {error}); check the network, or give the "
            "problems as a file"
        ) from error


def read_traces(path: Path) -> list[Trace]:
    """Traces of a file: one JSON object per line with `prompt`, `response` and, optionally, `correct`.

    Raises:
        KVPolicyError: there is no such file, it is empty, or a line is no trace.
    """
    traces = []
    for number, row in enumerate(_read_lines(path), 1):
        correct = row.get("correct")
        if not (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)) or not (
            correct is None or isinstance(correct, bool)
        ):
            raise KVPolicyError(
                f"{path}, row {number} is no trace; it needs texts named prompt (chat template and all) and response, "
                "and may have correct (true or false)"
            )
        traces.append(Trace(row["prompt"], row["response"], correct))
    if not traces:
        raise KVPolicyError(f"{path} has no traces")
    return traces


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Write what `read_traces` reads.

    Raises:
        KVPolicyError: the file cannot be written.
    """
    try:
        path.write_text("".join(json.dumps(asdict(trace)) + "\n" for trace in traces))
    except OSError as error:
        raise KVPolicyError(f"cannot write the traces {path} ({error.strerror}); choose another path") from None


def at_most_per_outcome(traces: Sequence[Trace], limit: int) -> list[Trace]:
    """The first `limit` right and the first `limit` wrong traces, in their order.

    Raises:
        KVPolicyError: a trace of which nobody knows whether it is right.
    """
    left = {True: limit, False: limit}
    chosen = []
    for trace in traces:
        if trace.correct is None:
            raise KVPolicyError("per-outcome limits need to know which traces are right; give answers, or leave it out")
        if left[trace.correct] > 0:
            left[trace.correct] -= 1
            chosen.append(trace)
    return chosen


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # Not splitlines: texts may hold other line ends, which JSON leaves alone.
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KVPolicyError(f"cannot read {path} ({error}); give a file with one JSON object per line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise KVPolicyError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise KVPolicyError(f"{path}, line {number} is JSON but not an object")
        yield row
