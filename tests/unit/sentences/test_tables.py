"""Token tables of several tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.sentences import build_tables, split_sentences
from tests.unit.sentences.tokenizers import byte_level, encode, sentence_piece, texts


def test_delimiters_are_closing_punctuation_and_newlines():
    endings = ["\n\n", ".\n\n", ".\n", " .\n", ").\n\n", "?\n", "!\n", '."\n', "]\n", "}\n\n", "。\n", "’\n", "'\n"]
    others = [":\n", ",\n", " \t", "a\n", "\n ", ";\n", "\n\na", "(\n", "..."]
    tokenizer = byte_level(["\n\n\n", *endings, *others])
    for text in (*endings, *others):
        assert len(encode(tokenizer, text)) == 1, f"the test's tokenizer does not merge {text!r}"
    found = texts(tokenizer, build_tables(tokenizer).delimiters)
    assert found == {"\n", "\n\n", "\n\n\n", *endings}


def test_delimiters_of_a_sentence_piece_tokenizer_are_byte_tokens():
    tokenizer = sentence_piece()
    tables = build_tables(tokenizer)
    assert tables.delimiters == {tokenizer.convert_tokens_to_ids("<0x0A>")}
    assert encode(tokenizer, "go.\n")[-1] in tables.delimiters
    wait, space_wait = (tokenizer.convert_tokens_to_ids(t) for t in ("Wait", "▁Wait"))
    assert {(wait,), (space_wait,)} <= set(tables.keywords)
    # "again" takes five pieces here and six with its space.
    assert {len(word) for word in tables.keywords if tokenizer.decode(list(word)).strip() == "again"} == {5, 6}
    sentences = split_sentences(encode(tokenizer, "go.\n Wait go\n\ngo again\ngo"), build_tables(tokenizer))
    assert [s.is_execution for s in sentences] == [True, False, False]


def test_delimiters_of_the_bundled_tokenizer(qwen_like):
    found = texts(qwen_like, build_tables(qwen_like).delimiters)
    assert "\n" in found
    assert any("." in text for text in found), "a full stop with its newlines should be one token"
    assert all(text.endswith("\n") and not set(text) & set(":,;abcxyz0123") for text in found)


def test_keywords_count_with_and_without_space_and_in_either_case():
    tokenizer = byte_level(["\n\n", "Wait", " Wait", " again"])
    words = {tokenizer.decode(list(word)) for word in build_tables(tokenizer).keywords}
    assert words == {
        f"{space}{word}"
        for space in ("", " ")
        for word in ("Wait", "wait", "Alternatively", "alternatively", "again", "Again")
    }


def test_published_tables_are_the_last_ids_of_the_published_strings():
    tokenizer = byte_level(["\n\n", ".\n", ".\n\n", " .\n", ")\n", ":\n", "Wait", " again"])
    tables = build_tables(tokenizer, compat="published")
    last = {encode(tokenizer, text)[-1] for text in ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")}
    assert tables.delimiters == last
    # " .\n" is a delimiter by default and unknown to the published code.
    assert encode(tokenizer, " .\n")[0] in build_tables(tokenizer).delimiters - tables.delimiters
    assert set(tables.keywords) == {(encode(tokenizer, word)[-1],) for word in ("Wait", "Alternatively", "again")}
    assert not tables.merges_delimiters
    assert tables.penalty_rule == "last"


def test_default_tables_merge_delimiters_and_take_the_highest_repeat(qwen_like):
    tables = build_tables(qwen_like)
    assert tables.merges_delimiters
    assert tables.penalty_rule == "max"


def test_unknown_compat_is_refused(qwen_like):
    with pytest.raises(KVPolicyError, match="compat='paper' is unknown; choose one of: default, published"):
        build_tables(qwen_like, compat="paper")


def test_a_tokenizer_without_newlines_is_refused_with_a_remedy():
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")))
    with pytest.raises(KVPolicyError, match=r"no token that ends in a newline.*--kv-policy rkv"):
        build_tables(tokenizer)
