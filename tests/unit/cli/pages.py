"""Traces to view, and their pages."""

from __future__ import annotations

import functools
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipkv_vllm import bundled_model
from skipkv_vllm.cli import main, trace_view
from skipkv_vllm.trace.files import Trace

LAYERS, HEADS, BUDGET, BUFFER = 2, 3, 16, 8
NASTY = "</script><script>alert(1)</script><b>b</b> &amp; <!-- {{DATA}} {{TITLE}} \u2028 é😀\n\t\\ \" '"


@functools.cache
def tokenizer():
    return trace_view.load_tokenizer(bundled_model())


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def make_trace(lives=((0, 4),), *, text: str = "", extra: int = 3, **parameters) -> Trace:
    """A trace of random survivors.

    Args:
        lives: number of each life and its compactions; each life begins with a longer text than the previous one.
        text: beginning of the output.
        extra: tokens written after the last compaction, the last sampled one not counted.
        parameters: besides the model and the request; with `kv_recall_memory` evicted tokens come back.
    """
    generator = torch.Generator().manual_seed(5)
    kept: list[Tensor] = []
    logical: list[int] = []
    before: list[int] = []
    life: list[int] = []
    for number, count in lives:
        length = logical[-1] + 2 if logical else BUDGET + BUFFER
        held = torch.arange(length).expand(LAYERS, HEADS, -1)
        for _ in range(count):
            if parameters.get("kv_recall_memory"):
                held = torch.arange(length).expand(LAYERS, HEADS, -1)
            score = torch.rand(held.shape, generator=generator)
            rows = held.gather(2, score.topk(BUDGET, dim=2).indices).sort(2).values
            kept.append(rows.int())
            logical.append(length)
            before.append(min(held.shape[2], BUDGET + BUFFER))
            life.append(number)
            new = torch.arange(length, length + BUFFER).expand(LAYERS, HEADS, -1)
            held, length = torch.cat([rows, new], dim=2), length + BUFFER
    output = encode(text)
    total = max([*logical, len(output) + 6, BUDGET + BUFFER]) + extra + 1
    filler = encode("Step 1: so that is it.") * total
    ids = [*filler[:6], *output, *filler][:total]
    return Trace(
        prompt_token_ids=torch.tensor(ids[:6]),
        output_token_ids=torch.tensor(ids[6:]),
        logical_length=torch.tensor(logical, dtype=torch.int64),
        resident_before=torch.tensor(before, dtype=torch.int64),
        kept=kept,
        life=torch.tensor(life, dtype=torch.int64),
        sentences=torch.tensor([[6, 10], [10, 15], [15, 18]]),
        similar_pairs=torch.tensor([[0, 2], [1, 2]]),
        similarity=torch.tensor([0.875, 0.75]),
        parameters={"model": bundled_model(), "request_id": "r", "request_policy": "skipkv", **parameters},
    )


class Parsed(HTMLParser):
    """The page as a browser parses it: its title, its scripts and the other tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(page)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside][-1] += data


def view(folder: Path, trace: Trace, *arguments: str) -> Parsed:
    """Return the page that the command writes for a trace."""
    file = folder / "a.safetensors"
    trace.save(file)
    with pytest.raises(SystemExit) as stop:
        main(["trace", "view", str(file), *arguments])
    assert stop.value.code == 0
    return Parsed(file.with_suffix(".html").read_text(encoding="utf-8"))


def error_of(capsys, *arguments: object) -> str:
    """Return the message of a failing command."""
    with pytest.raises(SystemExit) as stop:
        main(["trace", "view", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err
