"""Results of the oracle that several engines are compared with."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.reference.model import Model
from tests.reference.request import Replay, generate
from tests.reference.settings import EngineTrace, Result, Settings

FOLDER = "SKIPKV_TEST_REFERENCES"
"""Variable that names a folder in which processes that run after each other, or at the same time, share results."""


class ReferenceCache:
    """Computes each result once, unless a near tie asks for another one."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._results: dict[tuple, Result] = {}
        self._folder = os.environ.get(FOLDER)

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """Return `generate`'s result, or an earlier one with the same survivors as the trace."""
        key = (tuple(prompt), num_new, settings)
        known = self._results.get(key)
        if known is None and self._folder:
            known = _load(self._path(key))
        if known is None or not _same_survivors(known, trace):
            known = generate(self.model, prompt, num_new, settings, trace)
            if self._folder:
                _save(self._path(key), known)
        self._results[key] = known
        return known

    def _path(self, key: tuple) -> Path:
        """Return the file of a result, whose name depends on all that the result depends on."""
        gates = b"".join(_bytes(each) for layer in self.model.gates for each in layer)
        name = hashlib.sha256(b"".join([_sources(), self._weights, gates, pickle.dumps(key)])).hexdigest()
        return Path(self._folder or "", name)

    @functools.cached_property
    def _weights(self) -> bytes:
        lm = self.model.lm
        # Random models are written to another folder in each process.
        config = lm.config.to_dict() | {"_name_or_path": ""}
        found = hashlib.sha256(repr(sorted(config.items())).encode())
        for name, tensor in lm.state_dict().items():
            found.update(name.encode() + _bytes(tensor))
        return found.digest()


@functools.cache
def _sources() -> bytes:
    """Return a hash of the oracle's own code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _load(path: Path) -> Result | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _save(path: Path, result: Result) -> None:
    # Another process may read or write the same one.
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.replace(path)


def _same_survivors(result: Result, trace: EngineTrace) -> bool:
    return len(result.events) == len(trace.kept) and all(
        torch.equal(event.kept, kept.long()) for event, kept in zip(result.events, trace.kept, strict=True)
    )


class Replays:
    """In place of a `ReferenceCache`: replays of what an engine did.

    Args:
        model: the oracle's.
        tokens: the engine's answers by prompt and settings.
    """

    def __init__(self, model: Model, tokens: dict[tuple[tuple[int, ...], Settings], list[int]]) -> None:
        self.model = model
        self._tokens = tokens

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """Return what the oracle computes along the engine's answer."""
        return Replay(self.model, prompt, settings, trace, self._tokens[tuple(prompt), settings]).run(num_new)
