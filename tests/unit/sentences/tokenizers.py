"""Small tokenizers and tables for tests."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skipkv_vllm.sentences import SentenceTables


def byte_level(merged: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that makes each given string one token; earlier strings take precedence."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []

    def build() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    for text in merged:
        joined, *rest = build().encode(text).tokens
        for symbol in rest:
            merges.append((joined, symbol))
            joined += symbol
            vocab.setdefault(joined, len(vocab))
    return PreTrainedTokenizerFast(tokenizer_object=build(), clean_up_tokenization_spaces=False)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Return a BPE like that of Llama 2: spaces are "▁", and a newline is the byte token <0x0A>."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *"WaitAlterntivygo.):,"]
    merges = [("W", "a"), ("Wa", "i"), ("Wai", "t"), ("▁", "Wait")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "Wa", "Wai", "Wait", "▁Wait"]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def texts(tokenizer: PreTrainedTokenizerFast, ids: frozenset[int]) -> set[str]:
    return {tokenizer.decode([i]) for i in ids}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


DOT, WAIT, A, OF, NL = 10, 11, 1, 2, 13
TABLES = SentenceTables(frozenset({DOT, NL}), ((WAIT,), (A, OF)), True, "max")
PUBLISHED = SentenceTables(TABLES.delimiters, TABLES.keywords, False, "last")
