"""Segmentation of token ids into sentences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm.sentences import Sentence, build_tables, split_sentences
from tests.unit.sentences.tokenizers import DOT, NL, OF, PUBLISHED, TABLES, WAIT, A, byte_level, encode


def test_segment_literal():
    assert split_sentences([1, 3, DOT, 4, 5, 6, NL, 7], TABLES) == [Sentence(0, 3, True), Sentence(3, 7, True)]


def test_consecutive_delimiters_extend_the_sentence_before_them():
    assert split_sentences([3, DOT, NL, NL, 4, DOT], TABLES) == [Sentence(0, 4, True), Sentence(4, 6, True)]


def test_consecutive_delimiters_are_sentences_in_published_tables():
    assert split_sentences([3, DOT, NL, 4, DOT], PUBLISHED) == [
        Sentence(0, 2, True),
        Sentence(2, 3, True),
        Sentence(3, 5, True),
    ]


def test_a_leading_delimiter_is_a_sentence_and_takes_the_following_ones():
    assert split_sentences([NL, NL, 5, DOT], TABLES) == [Sentence(0, 2, True), Sentence(2, 4, True)]


def test_keywords_of_several_tokens_must_be_consecutive_and_inside_one_sentence():
    assert split_sentences([A, OF, DOT], TABLES)[0].is_execution is False
    assert split_sentences([A, 5, OF, DOT], TABLES)[0].is_execution is True
    assert [s.is_execution for s in split_sentences([5, A, DOT, OF, WAIT, DOT], TABLES)] == [True, False]


def test_segment_of_real_text(qwen_like):
    text = "The answer is 12.\n\nWait, let me check it again.\nThis is right: \n a list.\n\n\nso"
    ids = encode(qwen_like, text)
    sentences = split_sentences(ids, build_tables(qwen_like))
    spelt = [qwen_like.decode(ids[s.start : s.end]) for s in sentences]
    assert "".join(spelt) + "so" == text
    assert spelt[0] == "The answer is 12.\n\n"
    assert spelt[1] == "Wait, let me check it again.\n"
    assert [s.is_execution for s in sentences[:3]] == [True, False, True]


def test_published_tables_miss_keywords_with_a_space():
    tokenizer = byte_level([".\n\n", " again"])
    ids = encode(tokenizer, "check again.\n\n")
    assert split_sentences(ids, build_tables(tokenizer))[0].is_execution is False
    assert split_sentences(ids, build_tables(tokenizer, "published"))[0].is_execution is True


streams = st.lists(st.sampled_from([A, OF, 3, 4, WAIT, DOT, NL]), max_size=60)


@settings(max_examples=300, deadline=None)
@given(streams, st.booleans())
def test_sentences_tile_the_text(tokens, merges):
    sentences = split_sentences(tokens, TABLES if merges else PUBLISHED)
    end = 0
    for sentence in sentences:
        assert sentence.start == end < sentence.end
        end = sentence.end
        body = tokens[sentence.start : sentence.end]
        first = next(i for i, t in enumerate(body) if t in (DOT, NL))
        # Everything after the first delimiter is a delimiter too, and only if delimiters are merged.
        assert all(t in (DOT, NL) for t in body[first:])
        assert merges or first == len(body) - 1
        text = ",".join(map(str, ["", *body, ""]))
        assert sentence.is_execution == (f",{WAIT}," not in text and f",{A},{OF}," not in text)
    assert not set(tokens[end:]) & {DOT, NL}
    if merges:
        # Only the first sentence can begin with a delimiter.
        assert not any(tokens[s.start] in (DOT, NL) for s in sentences[1:])
