"""Thoughts: their borders, their tokens and their kinds."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from skipkv_vllm import bundled_model
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering.extraction.thoughts import load_keywords, thoughts
from skipkv_vllm.steering.tables import split_tokens

OPEN, CLOSED = "question<think>\n", "question"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


def read(tokenizer, prompt, response):
    ids = tokenizer.encode(response, add_special_tokens=False)
    found = thoughts(prompt, ids, tokenizer, split_tokens(tokenizer))
    return [(tokenizer.decode([ids[t.boundary]]), tokenizer.decode(ids[: t.boundary + 1]), t.text) for t in found]


def test_a_thought_belongs_to_the_token_before_it(tokenizer):
    response = "Read a.\n\nWait, is that right?\n\nSo a holds.\n</think>\n\nThe end.\n\nReally."
    assert read(tokenizer, OPEN, response) == [
        (".\n\n", "Read a.\n\n", "Wait, is that right?\n\n"),
        ("?\n\n", "Read a.\n\nWait, is that right?\n\n", "So a holds.\n"),
    ]


def test_nothing_before_the_thoughts_open_counts(tokenizer):
    response = "Well.\n\nNow.\n\n<think>\nRead a.\n\nFind b.\n</think>\n\nIt is b."
    assert [text for *_, text in read(tokenizer, CLOSED, response)] == ["Find b.\n"]


def test_thoughts_that_were_cut_off_count(tokenizer):
    assert [text for *_, text in read(tokenizer, OPEN, "Read a.\n\nWait, is")] == ["Wait, is"]
    assert [text for *_, text in read(tokenizer, OPEN, "Read a.\n\n")] == [""]
    assert read(tokenizer, OPEN, "Read a") == []


@pytest.mark.parametrize("prompt", [CLOSED, "<think>old</think>again"])
def test_a_response_without_thoughts_is_refused(tokenizer, prompt):
    with pytest.raises(KVPolicyError, match="opens the thoughts with <think>"):
        read(tokenizer, prompt, "Read a.\n\nFind b.")


def test_a_tokenizer_without_blank_lines_is_refused():
    class Letters:
        def get_vocab(self):
            return {"a": 0, "\n": 1}

        def decode(self, ids):
            return "".join("a\n"[i] for i in ids)

    with pytest.raises(KVPolicyError, match="no token with a blank line"):
        split_tokens(Letters())


@pytest.mark.parametrize(
    ("name", "thought", "label"),
    [
        ("seal", "Wait, is that right?", "reflection"),
        ("seal", "  wait a moment", "reflection"),
        ("seal", "I will verify it.", "reflection"),
        ("seal", "Yes, that's correct.", "reflection"),
        ("seal", "Alternatively, use b.", "transition"),
        ("seal", "Let us try another method.", "transition"),
        # Reflection is tested first.
        ("seal", "Alternatively, make sure of a.", "reflection"),
        ("seal", "The waiter sums 1 and 2.", "execution"),
        ("seal", "So b: 3, once again.", "execution"),
        ("seal", "Or alternatively b.", "execution"),
        ("seal", " \n", None),
        ("skipkv", "So b: 3, once again.", "reflection"),
        ("skipkv", "But wait.", "reflection"),
        ("skipkv", "Or alternatively b.", "transition"),
        ("skipkv", "The waiter gains against it.", "execution"),
    ],
)
def test_labels(name, thought, label):
    assert load_keywords(name).label(thought) == label


def test_keywords_from_a_file(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"reflection": ["^hm", "sure\\?"], "execution": ["^find"]}))
    keywords = load_keywords(str(file))
    texts = ["Hm, no.", "Is a sure?", "Find b.", "Read a.", "Alternatively"]
    assert [keywords.label(text) for text in texts] == ["reflection", "reflection", "execution", None, None]
    assert json.loads(keywords.name) == json.loads(file.read_text())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('["wait"]', "must be an object with lists named"),
        ('{"execution": ["find"]}', "at least one of the first two"),
        ('{"reflection": ["wait"], "doubt": ["hm"]}', "must be an object with lists named"),
        ('{"reflection": "wait"}', "reflection must be a list of regular expressions, not 'wait'"),
        ('{"reflection": []}', r"reflection must be a list of regular expressions, not \[\]"),
        ('{"reflection": ["("]}', "is not a valid regular expression"),
    ],
)
def test_bad_keyword_files(tmp_path, content, message):
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(KVPolicyError, match=message):
        load_keywords(str(tmp_path / "words.json"))


def test_unknown_keywords():
    with pytest.raises(KVPolicyError, match="keywords='seel' is neither 'seal' nor 'skipkv' nor a file"):
        load_keywords("seel")
