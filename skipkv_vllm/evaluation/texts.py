"""Texts of equal length in tokens, read from plain files, JSON lines or traces."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import KVPolicyError

BETWEEN = "\n\n"
"""Separator of two documents of a source."""


@dataclass(frozen=True)
class Text:
    """A text to feed to a model.

    Attributes:
        source: name of its source; results are also reported by source.
        number: index within its source, from 0.
        tokens: token ids.
    """

    source: str
    number: int
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.source}#{self.number}"

    @property
    def digest(self) -> str:
        """Digest of the tokens; equal texts have equal results."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]


class Source:
    """Documents that are joined and cut into texts.

    Args:
        name: of the source.
        documents: strings, or lists of token ids.
    """

    def __init__(self, name: str, documents: Iterable[str | Sequence[int]]) -> None:
        self.name = name
        self._documents = documents

    def texts(self, tokenizer: Any, length: int, limit: int | None = None) -> list[Text]:
        """Cut the joined documents into texts; the remainder at the end is dropped.

        Args:
            tokenizer: of the model; each text begins with the tokens that it prepends, if any.
            length: tokens of each text.
            limit: most texts to return; None for all.

        Raises:
            KVPolicyError: too few tokens for one text, or a token id that the model does not have.
        """
        start = leading_tokens(tokenizer)
        body = length - len(start)
        between = tokenizer(BETWEEN, add_special_tokens=False).input_ids
        stream: list[int] = []
        for document in self._documents:
            if isinstance(document, str):
                tokens = tokenizer(document, add_special_tokens=False).input_ids
            else:
                tokens = [int(token) for token in document]
                self._check_ids(tokens, len(tokenizer))
            stream += [*between, *tokens] if stream else tokens
            if limit is not None and len(stream) >= limit * body:
                break
        pieces = [stream[at : at + body] for at in range(0, len(stream) - body + 1, body)]
        if not pieces:
            raise KVPolicyError(
                f"--texts {self.name}: has {len(stream)} tokens, which is less than one text of --length {length}; "
                "give more text or a smaller --length"
            )
        return [Text(self.name, number, (*start, *piece)) for number, piece in enumerate(pieces[:limit])]

    def _check_ids(self, tokens: Sequence[int], vocabulary: int) -> None:
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise KVPolicyError(
                f"--texts {self.name}: token id {wrong[0]} is out of range; allowed: 0 to {vocabulary - 1}. The trace "
                "was written by another model than --model"
            )


def leading_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer prepends to every text."""
    plain, special = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return special[: special.index(plain[0])] if plain[0] in special else []


def take_in_turn(sources: Sequence[Source], tokenizer: Any, length: int, limit: int | None) -> list[Text]:
    """Return texts of all sources without duplicates, one of each source in turn up to a limit.

    Args:
        sources: to take texts from.
        tokenizer: of the model.
        length: tokens of each text.
        limit: most texts in total; None for all.
    """
    columns = [source.texts(tokenizer, length, limit) for source in sources]
    chosen = [text for row in itertools.zip_longest(*columns) for text in row if text is not None][:limit]
    unique = {text.digest: text for text in reversed(chosen)}
    return sorted(unique.values(), key=chosen.index)


def read_sources(paths: Sequence[Path], tokenizer: Any) -> list[Source]:
    """Read files of texts; see `read_source`.

    A source is named after its file, with as many of its folders as make the name unique.

    Raises:
        KVPolicyError: a file cannot be read, or is given twice.
    """
    parts = [path.absolute().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        for depth in range(1, len(own) + 1):
            if sum(each[-depth:] == own[-depth:] for each in parts) == 1:
                return str(Path(*own[-depth:]))
        raise KVPolicyError(f"--texts {Path(*own)}: is given twice; give each file once")

    return [read_source(path, tokenizer, name(own)) for path, own in zip(paths, parts, strict=True)]


def read_source(path: Path, tokenizer: Any, name: str | None = None) -> Source:
    """Read a file of texts.

    Args:
        path: JSON lines with "text" or "messages" (.jsonl), a trace (.safetensors), or plain text.
        tokenizer: its chat template converts "messages" to text.
        name: of the source; the file's name by default.

    Raises:
        KVPolicyError: it cannot be read.
    """
    if not path.is_file():
        raise KVPolicyError(f"--texts {path}: there is no such file")
    name = name or path.name
    if path.suffix == ".safetensors":
        return Source(name, [_trace(path)])
    try:
        content = path.read_text()
    except UnicodeDecodeError as error:
        raise KVPolicyError(f"--texts {path}: is not UTF-8 text ({error}); convert it") from None
    except OSError as error:
        raise KVPolicyError(f"--texts {path}: cannot be read ({error.strerror}); check its permissions") from None
    if path.suffix == ".jsonl":
        return Source(name, _rows(path, content, tokenizer))
    return Source(name, [content])


def _trace(path: Path) -> list[int]:
    from ..trace.files import Trace

    try:
        trace = Trace.load(path)
    except Exception as error:  # safetensors raises its own errors
        raise KVPolicyError(
            f"--texts {path}: is not a trace ({error}); give a file from the folder of --kv-trace-dir"
        ) from None
    return [*trace.prompt_token_ids.tolist(), *trace.output_token_ids.tolist()]


def _rows(path: Path, content: str, tokenizer: Any) -> list[str]:
    documents = []
    # `splitlines` would also split at characters that JSON allows in strings, such as U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--texts {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KVPolicyError(f"{where}: is not JSON ({error})") from None
        kind, wanted = ("text", str) if isinstance(row, dict) and "text" in row else ("messages", list)
        if not isinstance(row, dict) or not isinstance(row.get(kind), wanted):
            raise KVPolicyError(f'{where}: has neither a "text" (a string) nor "messages" (a list); add one')
        documents.append(row["text"] if kind == "text" else _chat(where, row["messages"], tokenizer))
    return documents


def _chat(where: str, messages: Any, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise KVPolicyError(f'{where}: "messages" need a chat template, but the model has none; give "text" instead')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates may raise anything
        raise KVPolicyError(f"{where}: the model's chat template refuses the messages ({error})") from None
