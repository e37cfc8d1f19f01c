"""Results of the oracle that processes share in a folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.reference import references
from tests.reference.references import FOLDER, ReferenceCache
from tests.reference.settings import Event, Result, Settings

SETTINGS = Settings("rkv", "head", 8, 4)
KEPT = torch.arange(8).expand(1, 1, 8)


def model(seed: int = 0, folder: str = "a") -> SimpleNamespace:
    torch.manual_seed(seed)
    lm = nn.Linear(2, 2)
    lm.config = SimpleNamespace(to_dict=lambda: {"layers": 1, "_name_or_path": folder})
    return SimpleNamespace(lm=lm, gates=[])


@pytest.fixture
def computed(monkeypatch, tmp_path) -> list:
    """What was computed, in place of the oracle's computation."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    calls: list = []

    def generate(_, prompt, num_new, settings, trace) -> Result:
        calls.append((prompt, num_new, settings))
        return Result([1] * num_new, [Event(12, 12, trace.kept[0])])

    monkeypatch.setattr(references, "generate", generate)
    return calls


def get(one, prompt=(5, 6), num_new=3, settings=SETTINGS, kept=KEPT) -> Result:
    """Ask as a new process does, whose cache is empty."""
    trace = SimpleNamespace(kept=[kept], logical_length=torch.tensor([12]))
    return ReferenceCache(one).get(prompt, num_new, settings, trace)


def test_another_process_reads_what_was_computed(computed):
    first = get(model())
    again = get(model(folder="b"))
    assert len(computed) == 1
    assert again.tokens == first.tokens
    assert torch.equal(again.events[0].kept, KEPT)


@pytest.mark.parametrize(
    "changes",
    [
        {"one": model(seed=1)},
        {"prompt": (5, 7)},
        {"num_new": 4},
        {"settings": Settings("rkv", "head", 8, 5)},
        {"kept": KEPT + 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_is_computed(computed, changes):
    get(model())
    get(**{"one": model()} | changes)
    assert len(computed) == 2


def test_gates_and_the_oracles_code_are_part_of_the_name(computed, monkeypatch):
    get(model())
    gated = model()
    gated.gates = [[torch.tensor(1.0)]]
    get(gated)
    monkeypatch.setattr(references, "_sources", lambda: b"changed")
    get(model())
    assert len(computed) == 3


def test_without_a_folder_nothing_is_written(computed, monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER)
    get(model())
    assert not list(tmp_path.iterdir())
