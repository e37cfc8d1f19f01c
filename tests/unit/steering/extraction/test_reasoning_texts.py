"""Reasoning texts and problems: files, data sets of the hub, and their errors."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering.extraction.reasoning_texts import (
    BOXED,
    Problem,
    ReasoningText,
    at_most_per_outcome,
    load_problems,
    read_texts,
    write_texts,
)


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_texts_come_back(tmp_path):
    texts = [ReasoningText("a<think>", "b\u2028c\n\nd", True), ReasoningText("e", "f", False), ReasoningText("g", "h")]
    write_texts(tmp_path / "t.jsonl", texts)
    assert read_texts(tmp_path / "t.jsonl") == texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "row 1 is not a reasoning text"),
        ({"prompt": "a", "response": 1}, "row 1 is not a reasoning text"),
        ({"prompt": "a", "response": "b", "correct": "yes"}, "row 1 is not a reasoning text"),
        ("[1]", "line 1 is JSON but not an object"),
        ("{", "line 1 is not JSON"),
        ("", "has no reasoning texts"),
    ],
)
def test_bad_traces(tmp_path, row, message):
    lines(tmp_path / "t.jsonl", row)
    with pytest.raises(KVPolicyError, match=message):
        read_texts(tmp_path / "t.jsonl")


def test_missing_files(tmp_path):
    with pytest.raises(KVPolicyError, match="cannot read"):
        read_texts(tmp_path / "none.jsonl")
    with pytest.raises(KVPolicyError, match="cannot write the reasoning texts"):
        write_texts(tmp_path / "none" / "t.jsonl", [])
    with pytest.raises(KVPolicyError, match=r"neither a data set \(math-train, gsm8k-train\) nor a file"):
        load_problems("math-test", 0, 1)


def test_right_and_wrong_traces_are_limited_in_order():
    texts = [ReasoningText("p", str(i), i % 3 == 0) for i in range(9)]
    assert [t.response for t in at_most_per_outcome(texts, 2)] == ["0", "1", "2", "3"]
    with pytest.raises(KVPolicyError, match="needs texts that are known to be right or wrong"):
        at_most_per_outcome([ReasoningText("p", "r")], 2)


def test_problems_of_a_file(tmp_path):
    file = lines(tmp_path / "p.jsonl", *({"question": f"q{i}", "answer": i} for i in range(3)), {"question": "q3"})
    assert load_problems(file, 2, 2) == [Problem("q2", "2"), Problem("q3", None)]
    with pytest.raises(KVPolicyError, match="has 4 problems, but 5 are needed"):
        load_problems(file, 3, 2)
    with pytest.raises(KVPolicyError, match="row 2 has no text named question; it has"):
        load_problems(lines(tmp_path / "b.jsonl", {"question": "q"}, {"problem": "q"}), 0, 2)


def test_problems_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if "gsm8k" in path:
            return [{"question": "How many?", "answer": "2 * 600 = 1200\n#### 1,200"}]
        return [{"problem": "What is x?", "answer": "\\frac12"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_problems("gsm8k-train", 0, 1) == [Problem(f"How many?\n{BOXED}", "1200")]
    assert load_problems("math-train", 0, 1) == [Problem(f"What is x?\n{BOXED}", "\\frac12")]
    # Never a test split.
    assert [split for *_, split in asked] == ["train", "train"]


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(KVPolicyError, match=r"could not load openai/gsm8k \(ConnectionError: no route\)"):
        load_problems("gsm8k-train", 0, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KVPolicyError, match=r"pip install 'skipkv-vllm\[eval\]'"):
        load_problems("gsm8k-train", 0, 1)
