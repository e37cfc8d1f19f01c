"""The operators that track sentences: every backend against the torch backend."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from skipkv_vllm.ops import native, torch_backend
from skipkv_vllm.worker.signals.sentence_tracker import OPEN
from tests.operators.backends import Backend, cases, each_backend, isa, on  # noqa: F401

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class TrackCase:
    """Random token streams in steps of random sizes.

    Attributes:
        merge: of the operator.
        width: E, or 0 for no embeddings.
        often: share of delimiters.
        dtype: of hidden states and embeddings.
        id_type: of token ids.
        longest: most tokens of a request in a step.
        held: embeddings kept.
        keeps_text: whether token ids are kept.
    """

    merge: bool = True
    width: int = 48
    often: float = 0.3
    dtype: torch.dtype = FLOAT
    id_type: torch.dtype = torch.int32
    longest: int = 9
    held: int = 4
    keeps_text: bool = False

    def state(self, slots: int) -> list[torch.Tensor]:
        """ends, count, after_delimiter, open_length, open_sum, embeddings and text of new requests."""
        return [
            torch.full((slots, 400), OPEN, dtype=torch.int32),
            torch.zeros(slots, dtype=torch.int64),
            torch.zeros(slots, dtype=torch.bool),
            torch.zeros(slots),
            torch.zeros(slots, self.width),
            torch.zeros(slots, self.held + 1, self.width, dtype=self.dtype),
            torch.zeros(slots, self.longest * 8 + 100 if self.keeps_text else 0, dtype=torch.int32),
        ]


TRACKS = {
    "merged": TrackCase(),
    "not merged": TrackCase(merge=False),
    "no embeddings": TrackCase(width=0),
    "bf16": TrackCase(dtype=BF16, width=201),
    "half, int64 ids": TrackCase(dtype=HALF, id_type=torch.int64),
    "one token a step": TrackCase(longest=1, often=0.6),
    "mostly delimiters": TrackCase(often=0.9),
    "mostly delimiters, not merged": TrackCase(often=0.9, merge=False),
    "long steps": TrackCase(longest=90, held=2, keeps_text=True),
    "text": TrackCase(width=0, keeps_text=True),
    "no delimiter": TrackCase(often=0.0),
}


@cases(TRACKS, few=("merged", "not merged", "one token a step", "text"))
def test_track_sentences(backend, case):
    if not hasattr(backend.module, "track_sentences"):
        pytest.skip(f"{backend} leaves track_sentences to PyTorch")
    generator = torch.Generator().manual_seed(0)
    slots = 5
    delimiters = torch.rand(50, generator=generator) < case.often
    got, wanted = on(backend.device, case.state(slots)), case.state(slots)
    written = [0] * slots
    for _ in range(8):
        chosen = torch.randperm(slots - 1, generator=generator)[: 1 + int(torch.randint(3, (), generator=generator))]
        spans, begin = [], 2
        for slot in chosen.tolist():
            number = int(torch.randint(1, case.longest + 1, (), generator=generator))
            spans.append((slot, begin, number, 100 + written[slot]))
            begin += number + 1  # tokens of untracked requests lie between
            written[slot] += number
        ids = torch.randint(50, (begin,), generator=generator).to(case.id_type)
        hidden = torch.randn(begin, case.width, generator=generator).to(case.dtype) if case.width else None
        table = torch.tensor(spans).T.contiguous()
        arguments = (ids, hidden, table, int(table[2].sum()), delimiters, case.merge)
        backend.module.track_sentences(*on(backend.device, arguments), *got)
        torch_backend.track_sentences(*arguments, *wanted)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            # The last column of ends and the last row of embeddings are for discarded writes.
            here, there = (x.cpu()[:, :-1] if i in (0, 5) else x.cpu() for x in (a, b))
            rtol = 2e-2 if i == 5 and case.dtype is not FLOAT else 1e-5
            torch.testing.assert_close(here, there, rtol=rtol, atol=1e-5 if rtol < 1e-3 else 1e-3)
    assert bool(wanted[1].any()) == (case.often > 0)


@dataclass(frozen=True)
class SentenceCase:
    """Sentences that close in several steps; `counts` is the number closed in each row after each step."""

    counts: tuple[tuple[int, ...], ...] = ((2, 0, 5), (3, 1, 5), (7, 4, 9))
    held: int = 16
    width: int = 64
    dtype: torch.dtype = FLOAT
    threshold: float = 0.6
    rule: int = 0
    topics: int = 3


SENTENCES = {
    "max": SentenceCase(),
    "last": SentenceCase(rule=1),
    "bf16": SentenceCase(dtype=BF16, width=200),
    "half, last": SentenceCase(dtype=HALF, width=200, rule=1),
    "more than are held": SentenceCase(((3, 4, 0), (9, 8, 1), (12, 30, 2)), held=4),
    "more than are held, last": SentenceCase(((3, 4, 0), (9, 8, 1), (12, 30, 2)), held=4, rule=1),
    "below zero": SentenceCase(threshold=-0.5),
    "below zero, last": SentenceCase(threshold=-0.5, rule=1),
    "nothing repeats": SentenceCase(threshold=1.1),
    "odd width": SentenceCase(width=37),
    "one topic": SentenceCase(topics=1, rule=1),
    "nothing is new": SentenceCase(((3, 4, 5), (3, 4, 5))),
    "none is held": SentenceCase(held=0),
    "hundreds": SentenceCase(((200, 0, 300), (290, 70, 401)), held=310, topics=40),
    "hundreds, last": SentenceCase(((200, 0, 300), (290, 70, 401)), held=310, topics=40, rule=1),
}


@cases(SENTENCES, few=("max", "last", "more than are held", "more than are held, last"))
def test_sentence_similarity(backend, case):
    generator = torch.Generator().manual_seed(0)
    slots = len(case.counts[0]) + 1
    topics = torch.randn(case.topics, case.width, generator=generator)
    embeddings = torch.zeros(slots, case.held + 1, case.width, dtype=case.dtype)
    compared = torch.zeros(slots, dtype=torch.int64)
    penalties = torch.zeros(slots, max(map(max, case.counts)) + 2)
    count = torch.zeros(slots, dtype=torch.int64)
    embeddings, compared, penalties, count = on(backend.device, (embeddings, compared, penalties, count))
    wanted_compared, wanted = compared.cpu(), penalties.cpu()
    for step in case.counts:
        for slot, number in enumerate(step):
            for n in range(int(count[slot]), number) if case.held else ():
                noise = 0.5 * torch.randn(case.width, generator=generator)
                sentence = noise + topics[torch.randint(case.topics, (), generator=generator)]
                embeddings[slot, n % case.held] = (sentence / sentence.norm()).to(embeddings)
            count[slot] = number
        # Not the last slot, and out of order.
        chosen = torch.tensor([2, 0, 1])
        options = (case.threshold, case.rule)
        backend.module.sentence_similarity(embeddings, chosen.to(backend.device), count, compared, penalties, *options)
        torch_backend.sentence_similarity(embeddings.cpu(), chosen, count.cpu(), wanted_compared, wanted, *options)
        assert torch.equal(compared.cpu(), wanted_compared)
        torch.testing.assert_close(penalties.cpu(), wanted, rtol=1e-5, atol=1e-6)


HELD = {
    "plain": (4, [20, 13], [9, 0]),
    "nothing was moved": (4, [0, 0], [0, 0]),
    "everything was moved": (8, [40, 40], [7, 1]),
    "pages of one token": (1, [5, 40], [3, 100_000]),
    "more was moved than is requested": (16, [64, 3], [2, 2]),
}


@cases(HELD)
def test_held_positions(backend, case):
    page_size, placed, evicted = case
    generator = torch.Generator().manual_seed(0)
    pages = 2 * 64 // page_size + 3
    sidecar = torch.randint(100, (3, pages, 2, page_size), generator=generator, dtype=torch.int32)
    table = torch.randperm(pages, generator=generator)[: pages - 3].view(2, -1).int()
    arguments = (sidecar, table, torch.tensor(placed).int(), torch.tensor(evicted).int())
    for length in (40, 1, 0):
        got = backend.module.held_positions(*on(backend.device, arguments), length).cpu()
        assert got.dtype is torch.int32
        assert torch.equal(got, torch_backend.held_positions(*arguments, length))
    # By the definition, token by token.
    whole = torch_backend.held_positions(*arguments, 40)
    for r, layer, head, slot in itertools.product(range(2), range(3), range(2), range(40)):
        entry = sidecar[layer, table[r, slot // page_size], head, slot % page_size]
        assert whole[r, layer, head, slot] == (entry if slot < placed[r] else slot + evicted[r])


@each_backend
@pytest.mark.parametrize("seed", range(6))
def test_token_penalties(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    most, slots = 90, 4
    ends = torch.full((slots, most + 1), torch.iinfo(torch.int32).max, dtype=torch.int32)
    penalties = torch.zeros(slots, most + 1)
    first = torch.tensor([0, 7, 30, 85])
    for slot, number in enumerate((12, 0, 20, most - 85)):
        closed = first[slot] + torch.randperm(most - int(first[slot]), generator=generator)[:number].sort().values
        ends[slot, :number] = closed.int()
        penalties[slot, :number] = torch.rand(number, generator=generator)
    chosen = torch.tensor([2, 0, 3, 1])
    positions = torch.randint(most, (4, 2, 3, 60), generator=generator, dtype=torch.int32)
    positions[1, :, :, -2:] = torch.tensor([-3, -1], dtype=torch.int32)
    arguments = (ends, penalties, first, chosen, positions)
    got = backend.module.token_penalties(*on(backend.device, arguments)).cpu()
    assert torch.equal(got, torch_backend.token_penalties(*arguments))
    # Past the longest sequence any number will do, but no foreign memory may be read.
    positions[:, :, :, -1] = 2**31 - 1
    far = backend.module.token_penalties(*on(backend.device, arguments)).cpu()
    assert torch.equal(far[..., :-1], got[..., :-1])
    assert (got > 0).any()
    for r, place in itertools.product(range(4), range(60)):
        position = int(positions[r, 0, 0, place]) if place < 59 else -1
        sentence = next(i for i, end in enumerate(ends[chosen[r]].tolist()) if end >= position)
        wanted = penalties[chosen[r], sentence] if position >= first[chosen[r]] else 0.0
        assert place == 59 or got[r, 0, 0, place] == wanted


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("held_positions", {1: torch.full((1, 4), 9, dtype=torch.int32)}, "names page 9 of 6"),
        ("held_positions", {2: torch.tensor([40], dtype=torch.int32)}, "table has 4 pages; 5 are needed"),
        ("held_positions", {4: -1}, "length=-1"),
        ("token_penalties", {3: torch.tensor([3])}, "row 3 of 3"),
        ("token_penalties", {1: torch.zeros(3, 8)}, "penalties must have size 9"),
    ],
)
def test_bad_arguments_of_what_is_held_are_refused(name, change, message):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    table, one = torch.arange(4, dtype=torch.int32)[None], torch.ones(1, dtype=torch.int32)
    given: dict[str, list[Any]] = {
        "held_positions": [torch.zeros(2, 6, 2, 4, dtype=torch.int32), table, one, one, 20],
        "token_penalties": [
            *(torch.zeros(3, 9, dtype=torch.int32), torch.zeros(3, 9), torch.zeros(3, dtype=torch.int64)),
            *(torch.tensor([1]), torch.zeros(1, 2, 2, 4, dtype=torch.int32)),
        ],
    }
    arguments = given[name]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(native, name)(*arguments)
