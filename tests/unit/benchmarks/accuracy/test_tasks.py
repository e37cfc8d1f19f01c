"""Data sets of the accuracy harness: fields, prompts, references, and messages about bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy import UsageError
from benchmarks.accuracy.tasks import BOXED, DATA_SETS, load_tasks

ROWS = {
    "tiny": {"question": "What is a + b?", "answer": 7},
    "gsm8k": {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>\n#### 1,205"},
    "math500": {"problem": "Half?", "answer": "\\frac{1}{2}", "solution": "...", "level": 1},
    "aime24": {"id": 60, "problem": "Find n.", "answer": "025"},
    "livecodebench": {
        "question_content": "Add two numbers.",
        "starter_code": "",
        "public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]',
        "private_test_cases": "[]",
        "metadata": "{}",
    },
}
REFERENCES = {"tiny": "7", "gsm8k": "1205", "math500": "\\frac{1}{2}", "aime24": "025"}


def write(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_with_the_published_fields(name, tmp_path):
    (task,) = load_tasks(name, None, jsonl=write(tmp_path, ROWS[name]))
    (message,) = task.messages
    assert message["role"] == "user"
    assert next(iter(v for v in ROWS[name].values() if isinstance(v, str))) in message["content"]
    if name == "livecodebench":
        assert task.kind == "code"
        assert json.loads(task.reference)["public_test_cases"] == ROWS[name]["public_test_cases"]
    else:
        assert task.reference == REFERENCES[name]
        assert message["content"].endswith(BOXED) == (name != "tiny")


def test_starter_code_is_shown(tmp_path):
    row = ROWS["livecodebench"] | {"starter_code": "class Solution:"}
    (task,) = load_tasks("livecodebench", None, jsonl=write(tmp_path, row))
    assert "```python\nclass Solution:\n```" in task.messages[0]["content"]


def test_generated_problems_are_those_of_the_split():
    held_out, dev = load_tasks("tiny", 3, split="held-out"), load_tasks("tiny", 3, split="dev")
    assert [task.id for task in held_out] == ["held-out-0", "held-out-1", "held-out-2"]
    assert held_out[0].messages != dev[0].messages
    # A trial run must not replace the reported figures.
    assert load_tasks("tiny", 3) == dev


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\n\n{"problem": "c", "answer": "2"}')
    assert [task.reference for task in load_tasks("math500", None, jsonl=str(path))] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "math500",
            {"question": "x", "answer": "1"},
            "row 1 has no field 'problem'; needed: problem, answer; found: question",
        ),
        ("gsm8k", {"question": "x", "answer": "5"}, "has no '#### <number>'"),
        ("aime24", ["x"], "line 1 is JSON but not an object"),
    ],
)
def test_wrong_rows(name, row, said, tmp_path):
    with pytest.raises(UsageError, match=r"rows\.jsonl|gsm8k") as error:
        load_tasks(name, None, jsonl=write(tmp_path, row))
    assert said in str(error.value)


def test_other_bad_input(tmp_path, monkeypatch):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": \n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    cases = [
        (("mmlu", 1), {}, "--data 'mmlu' is not one of: tiny"),
        (("tiny", 1), {"split": "train"}, "--split 'train' is not one of: dev, held-out, demo"),
        (("math500", 1), {"jsonl": str(tmp_path / "none")}, "No such file"),
        (("math500", 1), {"jsonl": str(broken)}, "line 1 is not JSON"),
        (("math500", None), {"jsonl": str(empty)}, "has 0 rows"),
        (("math500", 3), {"jsonl": write(tmp_path, ROWS["math500"])}, "--problems 3: "),
    ]
    for arguments, options, said in cases:
        with pytest.raises(UsageError) as error:
            load_tasks(*arguments, **options)
        assert said in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'skipkv-vllm\[eval\]', or give the rows as --jsonl"):
        load_tasks("gsm8k", 1)
