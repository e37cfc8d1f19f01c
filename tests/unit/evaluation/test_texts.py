"""Texts of an evaluation: reading, cutting and drawing them."""

from __future__ import annotations

import json
import re
from argparse import Namespace

import pytest
import torch

from benchmarks.texts import KINDS, default_sources, repetitive, solutions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation.texts import Source, read_source, read_sources, take_in_turn
from skipkv_vllm.trace.files import Trace


def test_documents_are_joined_and_cut(tokenizer):
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Wait, ", "\n\n", "So a = 1.")]
    stream = words[0] + words[1] + words[2]
    source = Source("s", ["Wait, ", "So a = 1."])
    length = len(stream) // 2
    found = source.texts(tokenizer, length)
    assert [list(text.tokens) for text in found] == [stream[:length], stream[length : 2 * length]]
    assert [text.name for text in found] == ["s#0", "s#1"]


def test_texts_begin_with_the_tokens_that_the_tokenizer_puts_in_front():
    class Bos:
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> Namespace:
            ids = [ord(letter) for letter in text]
            return Namespace(input_ids=[1] * add_special_tokens + ids)

        def __len__(self) -> int:
            return 200

    texts = Source("s", ["abcdefg"]).texts(Bos(), 4)
    assert [text.tokens for text in texts] == [(1, 97, 98, 99), (1, 100, 101, 102)]


def test_files_of_all_kinds_are_read(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("So a = 1.")
    rows = [{"text": "So a = 1."}, {"messages": [{"role": "user", "content": "What is a?"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    ints = [torch.tensor(values) for values in ([5, 6], [7], [], [])]
    empty = torch.zeros(0, 2, dtype=torch.int64)
    Trace(*ints[:2], ints[2], ints[2], [], ints[2], empty, empty, torch.zeros(0), {}).save(tmp_path / "c.safetensors")
    plain, lines, trace = (read_source(tmp_path / name, tokenizer) for name in ("a.txt", "b.jsonl", "c.safetensors"))
    assert plain._documents == ["So a = 1."]
    assert lines._documents[0] == "So a = 1."
    assert "What is a?" in lines._documents[1]
    assert list(trace._documents) == [[5, 6, 7]]


def test_line_breaks_of_unicode_do_not_end_a_json_line(tokenizer, tmp_path):
    rows = [{"text": "So a\u2028= 1.\x85"}, {"text": "So b = 2."}]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert read_source(tmp_path / "a.jsonl", tokenizer)._documents == [row["text"] for row in rows]


def test_files_of_the_same_name_are_different_sources(tokenizer, tmp_path):
    paths = [tmp_path / name for name in ("a/x/notes.txt", "b/x/notes.txt", "b/other.txt")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("So a = 1.")
    assert [source.name for source in read_sources(paths, tokenizer)] == [
        "a/x/notes.txt",
        "b/x/notes.txt",
        "other.txt",
    ]
    with pytest.raises(KVPolicyError, match=r"--texts .*other\.txt: is given twice; give each file once"):
        read_sources([*paths, paths[2]], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"{", "line 1: is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"answer": "x"}', 'line 2: has neither a "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1: has neither a "text"'),
        ("a.jsonl", b'{"text": ["x"]}', 'line 1: has neither a "text"'),
        ("a.jsonl", b'{"messages": "x"}', 'line 1: has neither a "text"'),
        ("a.safetensors", b"nothing", "is not a trace"),
    ],
)
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KVPolicyError, match=message):
        read_source(tmp_path / name, tokenizer)


def test_too_little_text_and_foreign_tokens_are_refused(tokenizer):
    with pytest.raises(KVPolicyError, match="less than one text of --length 50"):
        Source("s", ["So a = 1."]).texts(tokenizer, 50)
    with pytest.raises(KVPolicyError, match="token id 999999 is out of range; allowed: 0 to"):
        Source("s", [[1, 999999]]).texts(tokenizer, 2)


def test_texts_are_taken_in_turn_and_once(tokenizer):
    sources = [Source("a", [[1, 2, 3, 4, 5, 6]]), Source("b", [[7, 8]]), Source("c", [[3, 4]])]
    names = [text.name for text in take_in_turn(sources, tokenizer, 2, None)]
    assert names == ["a#0", "b#0", "c#0", "a#2"]
    assert [text.name for text in take_in_turn(sources, tokenizer, 2, 2)] == ["a#0", "b#0"]


def test_the_default_texts_are_there_and_stay_the_same():
    assert [source.name for source in default_sources()] == list(KINDS)
    assert all(len("".join(make())) > 50_000 for make in KINDS.values())
    assert repetitive(3) == repetitive(3) != repetitive(4)
    assert solutions(3) == solutions(3) != solutions(4)


def test_generated_calculations_are_right():
    text = repetitive(1) + solutions(1)
    formula = r"(?<![\w^(-])(?<![*+/-] )([(\d][\d ()*+/-]*[*+/-] [\d()]+) = (-?\d+)(?!\d|[./]\d| [*+/(-])"
    found = re.findall(formula, text)
    assert len(found) > 200
    for left, right in found:
        assert eval(left) == int(right), (left, right)
