"""Sentences of a text: where they end, whether they are execution, and which of their words recur later."""

from .segment import Sentence, split_sentences
from .tables import SentenceTables, Tokenizer, build_tables

__all__ = ["Sentence", "SentenceTables", "Tokenizer", "build_tables", "split_sentences"]
