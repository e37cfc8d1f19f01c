"""Token tables for `track_thoughts`: where thoughts end, and the keywords that tell their kind.

Sentences and keywords are those of `sentences.tables`, so that steering, eviction and traces agree.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import KVPolicyError
from ..ops import KEYWORD_SHIFT, THOUGHT
from ..sentences import SentenceTables, Tokenizer, build_tables

THINK_START, THINK_END = "<think>", "</think>"
MARKERS = {THINK_START: THOUGHT.BEGIN, THINK_END: THOUGHT.END}
REFLECTION, TRANSITION = 1, 2
_MAY_HOLD_NEWLINE = ("\n", "Ċ")


@dataclass(frozen=True, eq=False)
class ThoughtTables:
    """Tables of one tokenizer, on the CPU.

    Attributes:
        vocabulary, keywords: see the operator `track_thoughts`.
        merge: whether a delimiter right after another one closes no sentence.
    """

    vocabulary: Tensor
    keywords: Tensor
    merge: bool


def split_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that hold a blank line.

    Raises:
        KVPolicyError: the tokenizer has no such token.
    """
    found = frozenset(
        token_id
        for token, token_id in tokenizer.get_vocab().items()
        if any(mark in token for mark in _MAY_HOLD_NEWLINE) and "\n\n" in tokenizer.decode([token_id])
    )
    if not found:
        raise KVPolicyError(
            "the tokenizer has no token with a blank line, so thoughts cannot be told apart; use a model whose "
            "tokenizer merges newlines, as those of Qwen and Llama 3 do, or start without --kv-steering-vectors"
        )
    return found


def build_thought_tables(tokenizer: Tokenizer, vocab_size: int, compat: str = "default") -> ThoughtTables:
    """Build the tables of a tokenizer.

    The tokens that are steered are those at the end of a thought, whose text has a blank line. Vectors are made from
    the hidden states of the same tokens.

    Args:
        tokenizer: any Hugging Face tokenizer.
        vocab_size: number of token ids of the model; may exceed the tokenizer's.
        compat: "default" or "published", as for `sentences.build_tables`.

    Raises:
        KVPolicyError: no token for <think> or for </think>, or none with a blank line.
    """
    vocab = tokenizer.get_vocab()
    if missing := [marker for marker in MARKERS if marker not in vocab]:
        raise KVPolicyError(
            f"the tokenizer has no token for {' and '.join(missing)}, so its thinking cannot be found; "
            "start without --kv-steering-vectors"
        )
    splits = split_tokens(tokenizer)
    sentences = build_tables(tokenizer, compat)
    flags = dict.fromkeys(splits, THOUGHT.SPLIT)
    for token_id in sentences.delimiters:
        flags[token_id] = flags.get(token_id, 0) | THOUGHT.DELIMITER
    for marker, flag in MARKERS.items():
        flags[vocab[marker]] = flags.get(vocab[marker], 0) | flag
    classes = {token: i for i, token in enumerate(sorted({t for word in sentences.keywords for t in word}), 1)}
    vocabulary = torch.zeros(max(vocab_size, max(vocab.values()) + 1), dtype=torch.int32)
    for token_id in flags.keys() | classes.keys():
        vocabulary[token_id] = flags.get(token_id, 0) | classes.get(token_id, 0) << KEYWORD_SHIFT
    return ThoughtTables(vocabulary, _keyword_machine(sentences, list(classes)), sentences.merges_delimiters)


def _keyword_machine(sentences: SentenceTables, tokens: list[int]) -> Tensor:
    """Build the Aho-Corasick automaton; its state is the longest suffix of the text that is a prefix of a keyword."""
    words = sentences.keywords
    prefixes = sorted({word[:n] for word in words for n in range(len(word) + 1)}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    table = torch.zeros(len(prefixes), len(tokens) + 1, dtype=torch.int32)
    for prefix in prefixes:
        for column, token in enumerate(tokens, 1):
            text = (*prefix, token)
            ends = [text[i:] for i in range(len(text) + 1)]
            kinds = _kinds(ends, sentences)
            table[number[prefix], column] = next(number[end] for end in ends if end in number) << 2 | kinds
    return table


def _kinds(ends: Collection[tuple[int, ...]], sentences: SentenceTables) -> int:
    kinds = 0
    for word in sentences.keywords:
        if word in ends:
            kinds |= TRANSITION if word in sentences.transitions else REFLECTION
    return kinds
