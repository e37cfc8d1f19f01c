"""`skipkv trace view`: a trace as one HTML page that needs nothing but a browser.

The page gets, for each life of the request and each (layer, kv head, token), one small number: the
compaction that evicted the token. Which tokens are held after a compaction follows from a comparison,
because an evicted token never comes back within a life.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import KVPolicyError
from ..steering.controller import KINDS
from ..trace.files import Trace

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_TOKENS_OF_A_CHARACTER = 4  # a UTF-8 character has at most four bytes


class Page(NamedTuple):
    """A page that was written.

    Attributes:
        path: where it is.
        notes: what its reader should know about the data; the page says it as well.
    """

    path: Path
    notes: list[str]


def view(file: Path, out: Path | None = None, tokenizer: str | None = None) -> Page:
    """Write the page of one trace.

    Args:
        file: the trace.
        out: page to write; None takes `file` with the ending .html. A page of that name is replaced.
        tokenizer: name or folder; None takes the model the trace names.

    Raises:
        KVPolicyError: the trace or its tokenizer cannot be read, or the page cannot be written.
    """
    out = out or file.with_suffix(".html")
    trace = read_trace(file)
    if out.exists() and out.samefile(file):
        raise KVPolicyError(f"--out={out} is the trace itself; name another file")
    name = tokenizer or trace.parameters.get("model")
    if not name:
        raise KVPolicyError(f"{file} does not say which model wrote it; give its tokenizer with --tokenizer")
    ids = torch.cat([trace.prompt_token_ids, trace.output_token_ids]).tolist()
    data = page_data(trace, token_texts(load_tokenizer(str(name)), ids))
    try:
        out.write_text(render(data), encoding="utf-8")
    except OSError as error:
        raise KVPolicyError(
            f"--out={out} cannot be written ({error.strerror}); name a file in a folder that exists and may be written"
        ) from None
    return Page(out, data["notes"])


# ---- reading


def read_trace(path: Path) -> Trace:
    """Read a trace that may be anything.

    Raises:
        KVPolicyError: there is no such file, or it is not a trace.
    """
    if path.is_dir():
        raise KVPolicyError(f"FILE={path} is a folder; name one of the .safetensors files in it")
    if not path.exists():
        raise KVPolicyError(f"FILE={path} does not exist; traces are written to --kv-trace-dir when a request ends")
    try:
        # Looked at before anything is loaded: the file may as well be a checkpoint of many gigabytes.
        with safe_open(str(path), "pt") as file:
            names, parameters = set(file.keys()), (file.metadata() or {}).get("parameters")
        missing = set(Trace._fields) - {"kept", "parameters"} - names
        if missing or parameters is None:
            raise _not_a_trace(path, f"it has no {min(missing or {'parameters'})!r}")
        trace = Trace.load(path)
    except (OSError, SafetensorError, TypeError, json.JSONDecodeError) as error:
        raise _not_a_trace(path, str(error)) from None
    _check(trace, path)
    return trace


def _not_a_trace(path: Path, reason: str) -> KVPolicyError:
    return KVPolicyError(
        f"FILE={path} is not a SkipKV trace ({reason}); name a .safetensors file from the folder of --kv-trace-dir"
    )


def _check(trace: Trace, path: Path) -> None:
    count = len(trace.kept)
    for name, value in [*trace._asdict().items(), *((f"kept/{i}", kept) for i, kept in enumerate(trace.kept))]:
        axes = 3 if name.startswith("kept/") else 2 if name in ("sentences", "similar_pairs") else 1
        if isinstance(value, Tensor) and (value.dim() != axes or (axes == 2 and value.shape[1] != 2)):
            raise _not_a_trace(path, f"its {name!r} has the shape {tuple(value.shape)}")
        if isinstance(value, Tensor) and value.is_floating_point() != (name == "similarity"):
            raise _not_a_trace(path, f"its {name!r} is of {value.dtype}")
    if not isinstance(trace.parameters, dict):
        raise _not_a_trace(path, "its parameters are no object")
    if any(ids.numel() and int(ids.min()) < 0 for ids in (trace.prompt_token_ids, trace.output_token_ids)):
        raise _not_a_trace(path, "it has negative token ids")
    if any(len(t) != count for t in (trace.logical_length, trace.resident_before, trace.life)):
        raise _not_a_trace(path, f"it has {count} compactions, but not as many lengths")
    steps = list(zip(trace.life.tolist(), trace.logical_length.tolist(), strict=True))
    if steps != sorted(steps):
        raise _not_a_trace(path, "its compactions are not in order")
    if len({kept.shape[:2] for kept in trace.kept}) > 1:
        raise _not_a_trace(path, "its compactions differ in their layers or heads")
    for number, (kept, logical) in enumerate(zip(trace.kept, trace.logical_length.tolist(), strict=True), 1):
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < logical:
            raise _not_a_trace(path, f"compaction {number} keeps tokens outside of the {logical} there were")
    if len(trace.similar_pairs) != len(trace.similarity):
        raise _not_a_trace(path, "it has not one similarity per pair")
    if not bool(trace.similarity.isfinite().all()):
        raise _not_a_trace(path, "it has similarities that are no numbers")
    tokens = num_tokens(trace)
    if trace.sentences.numel() and not 0 <= int(trace.sentences.min()) <= int(trace.sentences.max()) <= tokens:
        raise _not_a_trace(path, f"it has sentences outside of its {tokens} tokens")


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer.

    Raises:
        KVPolicyError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    # A folder that is gone must not be looked for on the hub, which takes half a minute without a network.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise _no_tokenizer(name, "there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    # `tokenizers` raises bare exceptions for files it cannot read.
    except Exception as error:
        raise _no_tokenizer(name, (str(error) or type(error).__name__).splitlines()[0]) from error


def _no_tokenizer(name: str, reason: str) -> KVPolicyError:
    return KVPolicyError(
        f"tokenizer {name!r} cannot be loaded ({reason}); give the one of the model that wrote the trace "
        "with --tokenizer NAME_OR_FOLDER"
    )


# ---- text


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds to the tokens before it.

    A character made of several tokens belongs to the last of them; the others add "". A token that the
    tokenizer does not know is shown by its number.
    """
    texts: list[str] = []
    begin = read = 0  # the text of tokens begin:read is complete and gives the next token its context
    size = len(tokenizer)

    def decode(first: int, last: int) -> str:
        known = [i for i in token_ids[first:last] if i < size]
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for i, token_id in enumerate(token_ids):
        if token_id >= size:
            texts.append(f"⟨{token_id}⟩")
            begin = read = i + 1
            continue
        before, now = decode(begin, read), decode(begin, i + 1)
        is_last = i + 1 == len(token_ids) or token_ids[i + 1] >= size
        if now.endswith(REPLACEMENT) and not is_last and i + 1 - read < MAX_TOKENS_OF_A_CHARACTER:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        # Bytes that are no character may turn into one together with what follows, so they give no context.
        begin, read = (i + 1 if now.endswith(REPLACEMENT) else read), i + 1
    return texts


# ---- what the page knows


def num_tokens(trace: Trace) -> int:
    """Tokens to show; one more than the text has if the last compaction ran ahead of a request's end."""
    text = len(trace.prompt_token_ids) + len(trace.output_token_ids)
    return max([text, *trace.logical_length.tolist()])


def lost_at(kept: Sequence[Tensor], logical_length: Sequence[int]) -> Tensor:
    """The compaction that evicted each token of one life, counted from 1; 0 for tokens that were never evicted.

    Args:
        kept: per compaction, int `[layers, kv_heads, resident_after]` positions of the survivors.
        logical_length: tokens there were at each compaction, ascending.

    Returns:
        uint8, or int32 from 256 compactions on, `[layers, kv_heads, logical_length[-1]]`.

    Raises:
        KVPolicyError: an evicted token is kept later on.
    """
    dtype = torch.uint8 if len(kept) < 256 else torch.int32
    lost = torch.zeros(*kept[0].shape[:2], logical_length[-1], dtype=dtype)
    for number, (survivors, logical) in enumerate(zip(kept, logical_length, strict=True), 1):
        held = torch.zeros(lost.shape, dtype=torch.bool).scatter_(2, survivors.long(), True)
        if bool((held & (lost > 0)).any()):
            raise KVPolicyError(f"the trace is damaged: compaction {number} keeps a token that was evicted before")
        held[:, :, logical:] = True
        lost[~held & (lost == 0)] = number
    return lost


def _lives(trace: Trace) -> list[dict[str, Any]]:
    """One entry per life in which there was a compaction, oldest first; lengths are per compaction."""
    lives = []
    logical, before = trace.logical_length.tolist(), trace.resident_before.tolist()
    for life in sorted(set(trace.life.tolist())):
        rows = (trace.life == life).nonzero().flatten().tolist()
        lost = lost_at([trace.kept[i] for i in rows], [logical[i] for i in rows]).numpy()
        little_endian = lost.astype(np.dtype(lost.dtype).newbyteorder("<"))
        lives.append(
            {
                "life": life,
                "logical": [logical[i] for i in rows],
                "before": [before[i] for i in rows],
                "after": [trace.kept[i].shape[2] for i in rows],
                "lost_bytes": lost.itemsize,
                "lost": base64.b64encode(little_endian.tobytes()).decode(),
            }
        )
    return lives


def page_data(trace: Trace, texts: Sequence[str]) -> dict[str, Any]:
    """What the page knows, ready for JSON.

    Args:
        trace: the trace.
        texts: text of each prompt and output token.
    """
    ids = torch.cat([trace.prompt_token_ids, trace.output_token_ids]).tolist()
    tokens, n_sentences = num_tokens(trace), len(trace.sentences)
    notes = []
    if unknown := sum(text == f"⟨{i}⟩" for i, text in zip(ids, texts, strict=True)):
        notes.append(f"not in the tokenizer: {unknown} of the tokens; is it the one of the model that wrote the trace?")
    if beyond := tokens - len(ids):
        notes.append(f"computed beyond the end of the text: {beyond} of the tokens")
    pairs = [
        [earlier, later, round(similarity, 4)]
        for (earlier, later), similarity in zip(trace.similar_pairs.tolist(), trace.similarity.tolist(), strict=True)
        if 0 <= earlier < later < n_sentences
    ]
    if lacking := len(trace.similar_pairs) - len(pairs):
        notes.append(f"left out: {lacking} of the flagged pairs, whose sentences the trace does not list")
    lives = _lives(trace)
    # The last token that was sampled is never computed, so nothing holds it. That nothing was preempted after
    # the last compaction is taken for granted: the next one would have come within a few tokens.
    end = max([len(ids) - bool(len(trace.output_token_ids)), *trace.logical_length.tolist()[-1:]])
    return {
        "parameters": {name: _shown(value) for name, value in trace.parameters.items()},
        "prompt": len(trace.prompt_token_ids),
        "tokens": tokens,
        "ids": ids,
        "texts": list(texts),
        "sentences": trace.sentences.tolist(),
        "pairs": pairs,
        "layers": trace.kept[0].shape[0] if trace.kept else 0,
        "heads": trace.kept[0].shape[1] if trace.kept else 0,
        "lives": lives,
        "end": end,
        "notes": notes,
        "steering": _steering(trace.parameters.get("request_steering")),
    }


def _steering(told: Any) -> dict[str, str]:
    """What a request's steering came to, as label and text; nothing where it was not steered."""
    if not isinstance(told, dict):
        return {}
    names = ("vector", "alpha0", "gamma", "steered_tokens", *KINDS)
    said = {name: _shown(told.get(name, "?")) for name in names}
    return {
        "steering": f"{said['vector']}, alpha {said['alpha0']} + {said['gamma']} a thought that is no execution",
        "steered tokens": said["steered_tokens"],
        "thoughts": ", ".join(f"{said[kind]} {kind}" for kind in KINDS),
    }


def _shown(value: Any) -> str:
    # As text, because JSON in a browser has no NaN or Infinity and rounds large integers.
    return value if isinstance(value, str) else json.dumps(value)


def render(data: dict[str, Any]) -> str:
    """The page; nothing in `data` can leave the JSON block that carries it."""
    template = resources.files(__package__).joinpath("trace_view.html").read_text(encoding="utf-8")
    request_id = data["parameters"].get("request_id", "")
    head, tail = template.split("{{DATA}}")
    block = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        block = block.replace(character, f"\\u{ord(character):04x}")
    return head.replace("{{TITLE}}", html.escape(f"KV trace {request_id}".strip())) + block + tail
