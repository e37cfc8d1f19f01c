"""What every step takes: recorded queries, sentences, steering, and the corrections of lengths and slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipkv_vllm.core.device import to_device
from skipkv_vllm.ops import STATE, torch_backend

from .bench import Row, Settings
from .clocks import Work
from .machine import OURS, Machine

VOCABULARY = 152064
SENTENCE = 25
"""Tokens of a sentence, about as many as in reasoning traces."""
LONGEST = 4096
"""Positions for which the tracker has room."""
EMBEDDINGS = 64
"""Sentence embeddings kept of a request; the time of a step does not depend on it."""
MACHINE_STATES, MACHINE_CLASSES = 8, 4


@dataclass(frozen=True)
class Step:
    """A step in which each of T requests decodes a token.

    Attributes:
        ids: int64 `[T]`, token ids; one in `SENTENCE` ends a sentence.
        spans: int64 `[4, T]`, see `ops.schema`.
        hidden: `[T, E]`.
    """

    ids: Tensor
    spans: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, settings: Settings, tokens: int, device: torch.device) -> Step:
        """Draw a step."""
        generator = torch.Generator(device).manual_seed(tokens)
        ids = torch.randint(SENTENCE, (tokens,), generator=generator, device=device)
        row = torch.arange(tokens, device=device)
        spans = torch.stack([row, row, torch.ones_like(row), torch.full_like(row, LONGEST // 2)])
        width = settings.query_heads * settings.dim
        hidden = torch.randn(tokens, width, generator=generator, device=device).to(getattr(torch, settings.dtype))
        return cls(ids, spans, hidden)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)


def bench_step(machine: Machine, settings: Settings, tokens: int) -> list[Row]:
    """Make the rows of a step of some tokens, one for each operator; times in milliseconds.

    Queries and steering are captured in a graph, as they are in an engine.
    """
    step = Step.of(settings, tokens, machine.clock.device)
    rows = []
    for name, (make, is_captured) in OPERATORS.items():
        works, moved = make(machine, settings, step)
        if is_captured:
            works = {arm: machine.clock.captured(work) for arm, work in works.items()}
        timed = machine.time(works, settings.repeats, settings.seconds)
        row: Row = {"operator": name, "tokens": tokens, "graph": is_captured} | timed.ms()
        row["copy_gb_per_s"] = timed.reached.bandwidth / 1e9
        row["floor_ms"] = timed.reached.floor(0, moved) * 1e3
        host = machine.clock.enqueue(works[OURS])
        rows.append(row if host is None else row | {"host_us": host * 1e6})
    return rows


Made = tuple[dict[str, Work], float]
"""Calls by backend, and the fewest bytes that they read and write."""


def _arms(machine: Machine, operator: str, calls: Sequence[Sequence[Any]], pytorch: bool = True) -> dict[str, Work]:
    """Return, by backend, calls of an operator one after the other."""
    functions = {OURS if i == 0 else name: machine.function(operator, name) for i, name in enumerate(machine.backends)}
    if pytorch:
        functions["pytorch"] = getattr(torch_backend, operator)

    def every(function: Callable[..., Any]) -> Work:
        def work() -> None:
            for arguments in calls:
                function(*arguments)

        return work

    return {name: every(function) for name, function in functions.items()}


def _record(machine: Machine, settings: Settings, step: Step) -> Made:
    """Copy the queries of all layers into the ring; they are a part of the fused projection."""
    device, tokens, dtype = machine.clock.device, step.tokens, step.hidden.dtype
    heads = settings.query_heads + 2 * settings.heads
    fused = torch.randn(tokens, heads, settings.dim, device=device).to(dtype)
    query = fused[:, : settings.query_heads]
    entries = tokens * settings.window
    ring = torch.zeros(settings.layers, entries + 1, settings.query_heads, settings.dim, dtype=dtype, device=device)
    # The requests' entries lie apart; the last one takes what nobody reads, such as a graph's padding.
    index = torch.full((2 * tokens,), entries, dtype=torch.int64, device=device)
    index[:tokens] = torch.arange(tokens, device=device) * settings.window
    calls = [(query, index, layer, None) for layer in ring]
    return _arms(machine, "record_queries", calls), 2 * settings.layers * query.numel() * dtype.itemsize


def _sentences(machine: Machine, settings: Settings, step: Step, by_words: bool) -> Made:
    device, rows, width = machine.clock.device, step.tokens, step.hidden.shape[1]
    delimiters = torch.zeros(VOCABULARY, dtype=torch.bool, device=device)
    delimiters[0] = True
    ends = torch.full((rows, LONGEST + 1), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
    embedded = 0 if by_words else width
    state = (
        ends,
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
        torch.zeros(rows, device=device),
        torch.zeros(rows, embedded, device=device),
        torch.zeros(rows, (0 if by_words else EMBEDDINGS) + 1, embedded, dtype=step.hidden.dtype, device=device),
        torch.zeros(rows, LONGEST + 1 if by_words else 0, dtype=torch.int32, device=device),
    )
    hidden = None if by_words else step.hidden
    call = (step.ids, hidden, step.spans, step.tokens, delimiters, True, *state)
    # The hidden state and the sum so far are read, the sum is written.
    moved = rows * (12 + embedded * (step.hidden.element_size() + 8))
    # The same step again adds no sentence: a delimiter after a delimiter is merged.
    return _arms(machine, "track_sentences", [call]), moved


def _by_words(machine: Machine, settings: Settings, step: Step) -> Made:
    """Find sentences, and keep their words."""
    return _sentences(machine, settings, step, True)


def _by_embedding(machine: Machine, settings: Settings, step: Step) -> Made:
    """Find sentences, and keep their mean hidden states."""
    return _sentences(machine, settings, step, False)


def _thoughts(machine: Machine, settings: Settings, step: Step) -> Made:
    """Count thoughts, and compute how strongly each token is steered."""
    device, rows = machine.clock.device, step.tokens
    vocabulary = torch.zeros(VOCABULARY, dtype=torch.int32, device=device)
    vocabulary[0] = 3
    keywords = torch.zeros(MACHINE_STATES, MACHINE_CLASSES, dtype=torch.int32, device=device)
    state = torch.zeros(rows, len(STATE), dtype=torch.int32, device=device)
    state[:, :2] = 1
    strengths = torch.ones(rows, 3, device=device)
    choice, coefficient = torch.zeros(rows, dtype=torch.int32, device=device), torch.zeros(rows, device=device)
    numbers = (True, 128, strengths, state, rows, choice, coefficient)
    # PyTorch's definition counts on the host, token by token, so it is no comparison.
    works = _arms(machine, "track_thoughts", [(step.ids, step.spans, vocabulary, keywords, *numbers)], pytorch=False)
    return works, rows * (16 + 2 * 4 * len(STATE))


def _steer(machine: Machine, settings: Settings, step: Step) -> Made:
    """Add a vector to the hidden states of one layer; one token in `SENTENCE` is steered."""
    device = machine.clock.device
    choice = (step.ids == 0).int()
    vectors = torch.randn(2, step.hidden.shape[1], device=device)
    call = (step.hidden, torch.ones(step.tokens, device=device), choice, vectors)
    return _arms(machine, "steer_add", [call]), 2 * step.hidden.nbytes


def _corrections(machine: Machine, settings: Settings, step: Step) -> Made:
    """Take evicted tokens off lengths and slot positions, as `integration.runner_v2` does.

    The spans of the tokens are copied to the device in the same step.
    """
    device, tokens = machine.clock.device, step.tokens
    lengths, resident = (torch.full((tokens,), LONGEST, dtype=torch.int32, device=device) for _ in range(2))
    positions, slots = (torch.full((tokens,), LONGEST, dtype=torch.int64, device=device) for _ in range(2))
    evicted, spans = torch.ones(tokens, dtype=torch.int32, device=device), step.spans.cpu()

    def correct() -> None:
        to_device(spans, torch.int64, device)
        resident.copy_(lengths)
        resident.sub_(evicted)
        slots.copy_(positions)
        slots.sub_(evicted)

    return {OURS: correct}, tokens * (6 * 4 + 6 * 8 + 2 * 4 * 8)


RECORDED, BY_WORDS, BY_EMBEDDINGS = "recorded queries, all layers", "sentences by words", "sentences by embeddings"
CORRECTIONS = "corrections"

OPERATORS: dict[str, tuple[Callable[[Machine, Settings, Step], Made], bool]] = {
    RECORDED: (_record, True),
    BY_WORDS: (_by_words, False),
    BY_EMBEDDINGS: (_by_embedding, False),
    "steering: thoughts": (_thoughts, False),
    "steering: addition": (_steer, True),
    CORRECTIONS: (_corrections, False),
}
"""Name -> function that makes the calls, and whether an engine has them in its graphs."""
