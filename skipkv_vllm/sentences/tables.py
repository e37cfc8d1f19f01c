"""Which tokens end a sentence and which mark a thought as verification: tables built from a tokenizer.

The published code knows seven delimiters and three keywords by the last token id of each string. That
misses what real tokenizers do: a newline merges with the punctuation in front of it in many more ways
(`").\\n\\n"`, `" .\\n"`), and a keyword inside a sentence carries a leading space. So by default every token
of the vocabulary whose text is closing punctuation followed by newlines is a delimiter (a colon or comma
is not closing punctuation), and keywords count with and without a leading space, in either case of their
first letter, even where they take several tokens. `compat="published"` gives the published code's tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import KVPolicyError

PUBLISHED_DELIMITERS = ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")
KEYWORDS = ("Wait", "Alternatively", "again")
TRANSITIONS = ("Alternatively",)
"""Keywords of a change of approach; the others are those of doubt."""
_DELIMITER = re.compile(r" ?[.)?!\]}\"'”’。]*\n+")
_MAY_HOLD_NEWLINE = ("\n", "Ċ", "<0x0A>")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the tables need."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class SentenceTables:
    """Token tables of one tokenizer.

    Attributes:
        delimiters: ids of the tokens that end a sentence.
        keywords: token id sequences, any of which makes a sentence a non-execution thought.
        merges_delimiters: whether a delimiter right after a delimiter extends the sentence before it.
            The published code makes a one-token sentence of it.
        penalty_rule: which repeat's similarity counts when there are several, see `ops.sentence_penalties`.
        transitions: those of the keywords that announce another approach; the others express doubt.
    """

    delimiters: frozenset[int]
    keywords: tuple[tuple[int, ...], ...]
    merges_delimiters: bool
    penalty_rule: str
    transitions: frozenset[tuple[int, ...]] = frozenset()


def build_tables(tokenizer: Tokenizer, compat: str = "default") -> SentenceTables:
    """Build the tables of a tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer.
        compat: "default", or "published" for the rules of the published code.

    Raises:
        KVPolicyError: unknown `compat`, or a tokenizer without any delimiter.
    """
    if compat == "published":
        last = {text: tokenizer.encode(text, add_special_tokens=False)[-1] for text in PUBLISHED_DELIMITERS}
        ids: dict[str, tuple[int, ...]] = {
            word: (tokenizer.encode(word, add_special_tokens=False)[-1],) for word in KEYWORDS
        }
        transitions = frozenset(ids[word] for word in TRANSITIONS)
        return SentenceTables(frozenset(last.values()), tuple(sorted(set(ids.values()))), False, "last", transitions)
    if compat != "default":
        raise KVPolicyError(f"compat={compat!r} must be 'default' or 'published'")

    delimiters = frozenset(
        token_id
        for token, token_id in tokenizer.get_vocab().items()
        if any(mark in token for mark in _MAY_HOLD_NEWLINE) and _DELIMITER.fullmatch(tokenizer.decode([token_id]))
    )
    if not delimiters:
        raise KVPolicyError(
            "the tokenizer has no token that ends in a newline, so sentences cannot be found; "
            "use a policy that does not need sentences, e.g. --kv-policy rkv"
        )
    keywords: dict[tuple[int, ...], str] = {}
    for word in KEYWORDS:
        for form in {word, word.lower(), word.capitalize()}:
            for text in (form, f" {form}"):
                keywords[tuple(tokenizer.encode(text, add_special_tokens=False))] = word
    # A tokenizer that cannot spell a keyword at all gives no ids, and no ids would be found everywhere.
    keywords.pop((), None)
    transitions = frozenset(ids for ids, word in keywords.items() if word in TRANSITIONS)
    return SentenceTables(delimiters, tuple(sorted(keywords)), True, "max", transitions)
