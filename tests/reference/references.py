"""Results of the oracle that several engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.reference.model import Model
from tests.reference.request import Replay, generate
from tests.reference.settings import EngineTrace, Result, Settings


class ReferenceCache:
    """Computes each result once, unless a near tie asks for another one."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._results: dict[tuple, Result] = {}

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """Return `generate`'s result, or an earlier one with the same survivors as the trace."""
        key = (tuple(prompt), num_new, settings)
        known = self._results.get(key)
        if known is None or not _same_survivors(known, trace):
            self._results[key] = known = generate(self.model, prompt, num_new, settings, trace)
        return known


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
