"""Data sets as lists of tasks: from the Hugging Face hub, from a local JSONL with the same fields, or generated."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.tiny_reasoner.problems import SPLITS, problems

from . import UsageError

Kind = Literal["math", "code"]

# What DeepSeek recommends for R1 and its distills: no system prompt, the instruction in the user's turn.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

PROGRAM = "Write a correct Python program that solves the following problem and passes all its tests."
WITH_STARTER = "Complete this starter code and put the whole solution between the delimiters:\n```python\n{}\n```"
WITH_STDIN = (
    "Read the input from stdin and write the answer to stdout. Put the whole program between these delimiters:\n"
    "```python\n# your code\n```"
)


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        id: unique within its data set and split.
        messages: the chat so far, for the model's chat template.
        reference: what the grader needs: the true answer, or for code the tests as JSON.
        kind: which grader.
    """

    id: str
    messages: list[dict[str, str]]
    reference: str
    kind: Kind


@dataclass(frozen=True)
class DataSet:
    """The place where a data set is published, and the way its rows become tasks.

    Attributes:
        path: repository on the hub; None for one that is generated here.
        config: its configuration, None for the only one.
        split: default split.
        fields: fields that every row must have.
        prompt: row -> the user's message.
        reference: row -> see `Task.reference`.
        kind: which grader.
    """

    path: str | None
    config: str | None
    split: str
    fields: tuple[str, ...]
    prompt: Callable[[Mapping[str, Any]], str]
    reference: Callable[[Mapping[str, Any]], str]
    kind: Kind = "math"


def _gsm8k_reference(row: Mapping[str, Any]) -> str:
    _, found, answer = str(row["answer"]).rpartition("####")
    if not found:
        raise UsageError(f"gsm8k: answer {row['answer'][-60:]!r} has no '#### <number>' at its end")
    return answer.strip().replace(",", "")


def _code_prompt(row: Mapping[str, Any]) -> str:
    starter = row["starter_code"]
    return f"{PROGRAM}\n\n{row['question_content']}\n\n" + (WITH_STARTER.format(starter) if starter else WITH_STDIN)


def _code_tests(row: Mapping[str, Any]) -> str:
    # The hidden tests stay encoded until they are needed: decoding takes the library that also runs them.
    return json.dumps({name: row[name] for name in ("public_test_cases", "private_test_cases", "metadata")})


DATA_SETS: dict[str, DataSet] = {
    "tiny": DataSet(None, None, "dev", ("question", "answer"), lambda r: r["question"], lambda r: str(r["answer"])),
    "gsm8k": DataSet(
        "openai/gsm8k", "main", "test", ("question", "answer"), lambda r: f"{r['question']}\n{BOXED}", _gsm8k_reference
    ),
    "math500": DataSet(
        "HuggingFaceH4/MATH-500",
        None,
        "test",
        ("problem", "answer"),
        lambda r: f"{r['problem']}\n{BOXED}",
        lambda r: str(r["answer"]),
    ),
    "aime24": DataSet(
        "HuggingFaceH4/aime_2024",
        None,
        "train",
        ("problem", "answer"),
        lambda r: f"{r['problem']}\n{BOXED}",
        lambda r: str(r["answer"]),
    ),
    # `livecodebench/code_generation_lite` is published as a script, which `datasets` no longer runs; this is
    # the same table, without the script.
    "livecodebench": DataSet(
        "lighteval/code_generation_lite",
        "release_v1",
        "test",
        ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        _code_prompt,
        _code_tests,
        "code",
    ),
}


def load_tasks(name: str, count: int | None, *, split: str | None = None, jsonl: str | None = None) -> list[Task]:
    """Load the first `count` tasks of a data set; None for all.

    Raises:
        UsageError: unknown name or split, fewer rows than asked for, a row without a field, no `datasets`.
    """
    if name not in DATA_SETS:
        raise UsageError(f"--data {name!r} is not one of: {', '.join(DATA_SETS)}")
    data = DATA_SETS[name]
    split = split or data.split
    if jsonl is not None:
        rows, source = _read_jsonl(Path(jsonl)), jsonl
    elif data.path is None:
        rows, source = _generate(split, 200 if count is None else count), f"split {split} of {name}"
    else:
        rows, source = _download(name, data, split), f"split {split} of {data.path}"
    tasks = [_task(data, f"{split}-{i}", row, f"{source}, row {i + 1}") for i, row in enumerate(rows[:count])]
    if not tasks or (count is not None and len(tasks) < count):
        raise UsageError(f"--problems {count}: {source} has {len(tasks)} rows; ask for 1 to {len(rows)}")
    return tasks


def _task(data: DataSet, task_id: str, row: Mapping[str, Any], source: str) -> Task:
    missing = [field for field in data.fields if field not in row]
    if missing:
        raise UsageError(
            f"{source} has no field {', '.join(map(repr, missing))}; needed: {', '.join(data.fields)}; "
            f"found: {', '.join(row)}"
        )
    return Task(task_id, [{"role": "user", "content": data.prompt(row)}], data.reference(row), data.kind)


def _generate(split: str, count: int) -> list[dict[str, Any]]:
    if split not in SPLITS or split == "train":
        allowed = ", ".join(name for name in SPLITS if name != "train")
        raise UsageError(f"--split {split!r} is not one of: {allowed} (the bundled model has seen 'train')")
    return [{"question": problem.question, "answer": problem.answer} for problem in problems(split, count)]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise UsageError(f"--jsonl {path}: {error.strerror}; give a file with one JSON object per line") from None
    rows = []
    for number, line in _numbered(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"--jsonl {path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"--jsonl {path}, line {number} is JSON but not an object")
        rows.append(row)
    return rows


def _numbered(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _download(name: str, data: DataSet, split: str) -> list[dict[str, Any]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(
            f"--data {name} comes from the Hugging Face hub and needs the package `datasets`: "
            "pip install 'skipkv-vllm[eval]', or give the rows as --jsonl FILE"
        ) from None
    try:
        return list(datasets.load_dataset(data.path, data.config, split=split))
    except Exception as error:  # of any kind, by the library's many layers
        raise UsageError(
            f"--data {name}: could not load {data.path} ({type(error).__name__}: {error}); "
            f"check --split and the network, or give the rows as --jsonl FILE with the fields {', '.join(data.fields)}"
        ) from error
