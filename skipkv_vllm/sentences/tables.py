"""Token tables of a tokenizer: which tokens end a sentence, and which keywords mark a thought as verification.

The published code knows seven delimiters and three keywords, each by the last token id of its string. Real tokenizers
need more than that. They merge a newline with the punctuation in front of it in many other ways (`").\\n\\n"`,
`" .\\n"`), and a keyword inside a sentence carries a leading space.

By default, every token of the vocabulary whose text is closing punctuation followed by newlines is a delimiter (a colon
or comma is not closing punctuation). Keywords count with and without a leading space, with the first letter in either
case, and also where they take several tokens. `compat="published"` gives the tables of the published code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import KVPolicyError

PUBLISHED_DELIMITERS = ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")
KEYWORDS = ("Wait", "Alternatively", "again")
TRANSITIONS = ("Alternatively",)
"""Keywords of a change of approach; the others express doubt."""
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
        keywords: token id sequences; a sentence with any of them is a non-execution thought.
        merges_delimiters: whether a delimiter right after another one extends the sentence before it. In the published
            code it becomes a sentence of one token.
        penalty_rule: which similarity counts when a sentence is repeated several times, see `ops.sentence_penalties`.
        transitions: the keywords that announce another approach; the others express doubt.
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
        return _published_tables(tokenizer)
    if compat != "default":
        raise KVPolicyError(f"compat={compat!r} is unknown; choose one of: default, published")

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
    # A tokenizer that cannot spell a keyword gives no ids for it, and an empty sequence would match everywhere.
    keywords.pop((), None)
    transitions = frozenset(ids for ids, word in keywords.items() if word in TRANSITIONS)
    return SentenceTables(delimiters, tuple(sorted(keywords)), True, "max", transitions)


def _published_tables(tokenizer: Tokenizer) -> SentenceTables:
    last = {text: tokenizer.encode(text, add_special_tokens=False)[-1] for text in (*PUBLISHED_DELIMITERS, *KEYWORDS)}
    delimiters = frozenset(last[text] for text in PUBLISHED_DELIMITERS)
    keywords = tuple(sorted({(last[word],) for word in KEYWORDS}))
    return SentenceTables(delimiters, keywords, False, "last", frozenset((last[word],) for word in TRANSITIONS))
