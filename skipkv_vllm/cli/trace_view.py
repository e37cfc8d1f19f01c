"""`skipkv trace view`: write a trace as a self-contained HTML page.

For each life of the request (a preempted request starts a new one) and each (layer, kv head, token), the page stores
one small number: the compaction that first evicted the token. A comparison then gives the tokens held after any
compaction, unless evicted tokens came back; the page stores each such return and each later loss beside that.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import KVPolicyError
from ..steering.controller import KINDS
from ..trace.files import Trace

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_TOKENS_OF_A_CHARACTER = 4  # a UTF-8 character has at most four bytes


class Page(NamedTuple):
    """A written page.

    Attributes:
        path: of the file.
        notes: remarks about the data; the page shows them too.
    """

    path: Path
    notes: list[str]


def view(file: Path, out: Path | None = None, tokenizer: str | None = None) -> Page:
    """Write the page of one trace.

    Args:
        file: the trace.
        out: page to write, replacing an existing file; None for `file` with the suffix .html.
        tokenizer: name or folder; None for that of the trace's model.

    Raises:
        KVPolicyError: the trace or its tokenizer cannot be read, or the page cannot be written.
    """
    out = out or file.with_suffix(".html")
    trace = read_trace(file)
    if out.exists() and out.samefile(file):
        raise KVPolicyError(f"--out={out} is the trace itself; name another file")
    name = tokenizer or trace.parameters.get("model")
    if not name:
        raise KVPolicyError(f"{file} does not name its model; give the model's tokenizer with --tokenizer")
    ids = torch.cat([trace.prompt_token_ids, trace.output_token_ids]).tolist()
    data = page_data(trace, token_texts(load_tokenizer(str(name)), ids))
    try:
        out.write_text(render(data), encoding="utf-8")
    except OSError as error:
        raise KVPolicyError(
            f"--out={out} cannot be written ({error.strerror}); name a file in an existing, writable folder"
        ) from None
    return Page(out, data["notes"])


# ---- reading


def read_trace(path: Path) -> Trace:
    """Read a trace from a file that may contain anything.

    Raises:
        KVPolicyError: the file does not exist, or is not a trace.
    """
    if path.is_dir():
        raise KVPolicyError(f"FILE={path} is a folder; name one of the .safetensors files in it")
    if not path.exists():
        raise KVPolicyError(f"FILE={path} does not exist; traces are written to --kv-trace-dir when a request ends")
    try:
        # Before loading anything: the file may be a checkpoint of many gigabytes.
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
        raise _not_a_trace(path, "its parameters are not an object")
    if any(ids.numel() and int(ids.min()) < 0 for ids in (trace.prompt_token_ids, trace.output_token_ids)):
        raise _not_a_trace(path, "it has negative token ids")
    if any(len(t) != count for t in (trace.logical_length, trace.resident_before, trace.life)):
        raise _not_a_trace(path, f"it has {count} compactions, but not as many lengths")
    steps = list(zip(trace.life.tolist(), trace.logical_length.tolist(), strict=True))
    if steps != sorted(steps):
        raise _not_a_trace(path, "its compactions are not in order")
    if len({kept.shape[:2] for kept in trace.kept}) > 1:
        raise _not_a_trace(path, "its compactions have different numbers of layers or heads")
    for number, (kept, logical) in enumerate(zip(trace.kept, trace.logical_length.tolist(), strict=True), 1):
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < logical:
            raise _not_a_trace(path, f"compaction {number} keeps tokens beyond the {logical} computed by then")
    if len(trace.similar_pairs) != len(trace.similarity):
        raise _not_a_trace(path, "its numbers of pairs and similarities differ")
    if not bool(trace.similarity.isfinite().all()):
        raise _not_a_trace(path, "it has similarities that are not finite")
    tokens = num_tokens(trace)
    if trace.sentences.numel() and not 0 <= int(trace.sentences.min()) <= int(trace.sentences.max()) <= tokens:
        raise _not_a_trace(path, f"it has sentences beyond its {tokens} tokens")


def load_tokenizer(name: str) -> Any:
    """Load a Hugging Face tokenizer.

    Raises:
        KVPolicyError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    # Do not look for a missing folder on the hub, which takes half a minute without a network.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise _no_tokenizer(name, "the folder does not exist")
    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    # `tokenizers` raises plain exceptions for unreadable files.
    except Exception as error:
        raise _no_tokenizer(name, (str(error) or type(error).__name__).splitlines()[0]) from error


def _no_tokenizer(name: str, reason: str) -> KVPolicyError:
    return KVPolicyError(
        f"tokenizer {name!r} cannot be loaded ({reason}); give that of the trace's model with --tokenizer "
        "NAME_OR_FOLDER"
    )


# ---- text


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the tokens before it.

    A character made of several tokens is assigned to the last of them; the others add "". A token unknown to the
    tokenizer is shown as its number.
    """
    texts: list[str] = []
    begin = read = 0  # the text of tokens begin:read is complete and is the context of the next token
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
        # Incomplete bytes could merge with the next token into a character, so they are not used as context.
        begin, read = (i + 1 if now.endswith(REPLACEMENT) else read), i + 1
    return texts


# ---- data of the page


def num_tokens(trace: Trace) -> int:
    """Return the number of tokens to show: one more than the text has if the last compaction preceded the end."""
    text = len(trace.prompt_token_ids) + len(trace.output_token_ids)
    return max([text, *trace.logical_length.tolist()])


class Losses(NamedTuple):
    """What one life lost. Compactions, and exchanges between them, are numbered from 1.

    Attributes:
        first: number of the compaction that first evicted each token, 0 for none; uint8, or int32 from 256 numbers on,
            `[layers, kv_heads, tokens]`.
        later: int32 `[n, 2]`, a row for each return of a token and each loss after one, by number: index in `first`,
            and number.
    """

    first: Tensor
    later: Tensor


def losses_of(kept: Sequence[Tensor], logical_length: Sequence[int], *, may_return: bool) -> Losses:
    """Return which tokens one life lost, and when.

    Args:
        kept: per compaction, int `[layers, kv_heads, resident_after]` positions of the survivors.
        logical_length: tokens computed so far at each compaction, ascending.
        may_return: whether evicted tokens may come back.

    Raises:
        KVPolicyError: a token is kept after it was evicted, and may not be.
    """
    dtype = torch.uint8 if len(kept) < 256 else torch.int32
    lost = torch.zeros(*kept[0].shape[:2], logical_length[-1], dtype=dtype)
    was_held, later = torch.ones(lost.shape, dtype=torch.bool), []
    for number, (survivors, logical) in enumerate(zip(kept, logical_length, strict=True), 1):
        held = torch.zeros(lost.shape, dtype=torch.bool).scatter_(2, survivors.long(), True)
        if not may_return and bool((held & (lost > 0)).any()):
            raise KVPolicyError(f"the trace is damaged: compaction {number} keeps a token that was evicted before")
        held[:, :, logical:] = True
        index = ((held != was_held) & (lost > 0)).flatten().nonzero()
        later.append(torch.cat([index, torch.full_like(index, number)], dim=1).int())
        lost[~held & (lost == 0)] = number
        was_held = held
    return Losses(lost, torch.cat(later))


def _lives(trace: Trace) -> list[dict[str, Any]]:
    """Return one entry per life with a compaction, oldest first; lengths are per compaction."""
    lives = []
    may_return = bool(trace.parameters.get("kv_recall_memory"))
    logical, before = trace.logical_length.tolist(), trace.resident_before.tolist()
    for life in sorted(set(trace.life.tolist())):
        rows = (trace.life == life).nonzero().flatten().tolist()
        lost = losses_of([trace.kept[i] for i in rows], [logical[i] for i in rows], may_return=may_return)
        lives.append(
            {
                "life": life,
                "logical": [logical[i] for i in rows],
                "before": [before[i] for i in rows],
                "after": [trace.kept[i].shape[2] for i in rows],
                "lost_bytes": lost.first.itemsize,
                "lost": _encode(lost.first),
                "later_rows": _encode(lost.later),
            }
        )
    return lives


def _encode(numbers: Tensor) -> str:
    """Return integers as Base64, little-endian."""
    array = numbers.numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def page_data(trace: Trace, texts: Sequence[str]) -> dict[str, Any]:
    """Return the data of the page, ready for JSON.

    Args:
        trace: the trace.
        texts: text of each prompt and output token.
    """
    ids = torch.cat([trace.prompt_token_ids, trace.output_token_ids]).tolist()
    tokens, n_sentences = num_tokens(trace), len(trace.sentences)
    notes = []
    if unknown := sum(text == f"⟨{i}⟩" for i, text in zip(ids, texts, strict=True)):
        notes.append(f"tokens not in the tokenizer: {unknown}; is it that of the trace's model?")
    if beyond := tokens - len(ids):
        notes.append(f"tokens computed beyond the end of the text: {beyond}")
    pairs = [
        [earlier, later, round(similarity, 4)]
        for (earlier, later), similarity in zip(trace.similar_pairs.tolist(), trace.similarity.tolist(), strict=True)
        if 0 <= earlier < later < n_sentences
    ]
    if lacking := len(trace.similar_pairs) - len(pairs):
        notes.append(f"repeated pairs left out, because the trace does not list their sentences: {lacking}")
    lives = _lives(trace)
    # The last sampled token is never computed, so it has no KV. This assumes no preemption after the last compaction:
    # the next compaction would have followed within a few tokens.
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


def _steering(report: Any) -> dict[str, str]:
    """Return a request's steering as label and text; empty if it was not steered."""
    if not isinstance(report, dict):
        return {}
    names = ("vector", "alpha0", "gamma", "steered_tokens", *KINDS)
    shown = {name: _shown(report.get(name, "?")) for name in names}
    return {
        "steering": f"{shown['vector']}, alpha {shown['alpha0']} + {shown['gamma']} per non-execution thought",
        "steered tokens": shown["steered_tokens"],
        "thoughts": ", ".join(f"{shown[kind]} {kind}" for kind in KINDS),
    }


def _shown(value: Any) -> str:
    # As text: JSON in a browser has no NaN or Infinity and rounds large integers.
    return value if isinstance(value, str) else json.dumps(value)


def render(data: dict[str, Any]) -> str:
    """Return the page; nothing in `data` can escape from its JSON block."""
    template = resources.files(__package__).joinpath("trace_view.html").read_text(encoding="utf-8")
    request_id = data["parameters"].get("request_id", "")
    head, tail = template.split("{{DATA}}")
    block = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        block = block.replace(character, f"\\u{ord(character):04x}")
    return head.replace("{{TITLE}}", html.escape(f"KV trace {request_id}".strip())) + block + tail
