"""Tokens that come back: what was evicted is kept elsewhere, and the last queries choose among it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NUM_ASKING = 16
NUM_ANSWERING = 32
BASE, PRIOR = 4, 16
BEFORE, BEHIND = 4, 12


class RecalledTokens:
    """Everything a request has computed, and which tokens of it come back.

    Args:
        number: most tokens that come back at a time.
        threshold: evidence from which a token comes back to generated text.
    """

    def __init__(self, number: int, threshold: float) -> None:
        self._number, self._threshold = number, threshold
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._owners: list[list[int]] = []
        self._present: list[set[int]] = []
        self._question: dict[int, float] = {}
        self._first = self._end = 0
        self._scale: list[tuple[Tensor, Tensor]] = []

    def store(self, layers: Sequence[Any], num_new: int) -> None:
        """Add the tokens that were fed last; `layers` hold keys and values `[1, heads, held, D]`."""
        if not self._keys:
            self._keys, self._values = ([x[0, :, :0] for _ in layers] for x in (layers[0].keys, layers[0].values))
        for i, layer in enumerate(layers):
            self._keys[i] = torch.cat([self._keys[i], layer.keys[0, :, -num_new:]], dim=1)
            self._values[i] = torch.cat([self._values[i], layer.values[0, :, -num_new:]], dim=1)

    def compacted(self, held: Tensor, scores: Tensor, first: int, end: int) -> None:
        """Note which tokens may be replaced after a compaction, those with the lowest scores.

        Args:
            held: positions of the tokens that stayed, `[layers, heads, held]`.
            scores: theirs; infinite for those that always stay.
            first, end: positions between which tokens have been evicted.
        """
        self._first, self._end = first, end
        rows = zip(held.flatten(0, 1).tolist(), scores.flatten(0, 1).tolist(), strict=True)
        self._owners = []
        for positions, worth in rows:
            ascending = sorted(zip(worth, (-p for p in positions), strict=True))
            self._owners.append([-p for _, p in ascending[: self._number]])
        self._present = [set(owners) for owners in self._owners]
        if not self._scale:
            stored = [keys[:, first:end] for keys in self._keys]
            self._scale = [
                (x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)) for x in stored
            ]

    def is_owner(self, num_positions: int) -> Tensor:
        """Return which positions the last compaction left in the slots of others, bool `[rows, num_positions]`."""
        owners = torch.tensor(self._owners)
        return torch.zeros(len(owners), num_positions, dtype=torch.bool).scatter(1, owners, True)

    def choose(self, held: Tensor, queries: Tensor, owner: Tensor, *, may_answer: bool) -> Tensor:
        """Return the positions to hold now, ascending, `[layers, heads, held]`.

        Args:
            held: positions held so far.
            queries: the last ones, `[layers, Hq, n, D]`.
            owner: number of each token's sentence.
            may_answer: whether a question may have been asked just now.
        """
        layers, heads, _ = held.shape
        # What the method keeps in any case, and the newest tokens.
        fixed = [set(row) - came for row, came in zip(held.flatten(0, 1).tolist(), self._present, strict=True)]
        owners, stored = owner[self._first : self._end].tolist(), range(self._first, self._end)
        total, lacking = torch.zeros(len(stored)), torch.zeros(len(stored))
        for row, weight in enumerate(torch.stack([self._weights(i, queries[i]) for i in range(layers)]).flatten(0, 1)):
            lacks = torch.tensor([float(position not in fixed[row]) for position in stored])
            total += lacks * torch.log(weight * len(stored) / BASE).clamp(min=0)
            lacking += lacks
        evidence = (total / (lacking + PRIOR)).tolist()
        worth = {}
        for i, number in enumerate(owners):
            near = range(max(0, i - BEHIND), min(len(stored), i + BEFORE + 1))
            best = max(e for e, other in zip(evidence, owners, strict=True) if other == number)
            worth[stored[i]] = min(best, max(evidence[k] for k in near))
        # What the question asked for stays until it has been answered.
        if may_answer:
            worth = {p: max(e, self._question.get(p, 0.0)) for p, e in worth.items()}
            self._question = worth
        in_order = sorted(worth, key=lambda p: (-worth[p], p))
        # Around the end of a prompt half as much is enough.
        needed = self._threshold / 2 if may_answer else self._threshold
        for row, own in enumerate(self._owners):
            asked = [p for p in in_order if p not in fixed[row] and worth[p] >= needed]
            # Owners that nobody asks for come behind, the worthiest first.
            self._present[row] = set((asked + [p for p in reversed(own) if p not in asked])[: len(own)])
        chosen = [sorted(own | came) for own, came in zip(fixed, self._present, strict=True)]
        return torch.tensor(chosen).view(layers, heads, -1)

    def _weights(self, layer: int, queries: Tensor) -> Tensor:
        """The largest weight of a query `[Hq, W, D]` for each stored token, by its rough key; `[heads, stored]`."""
        keys = self._keys[layer][:, self._first : self._end]
        centre, spread = self._scale[layer]
        distance = (keys - centre) / spread
        rough = torch.where(distance > 0, spread, -spread) * distance.abs().mean(dim=-1, keepdim=True)
        grouped = queries.unflatten(0, (keys.shape[0], -1))
        weights = (grouped @ rough[:, None].mT / keys.shape[-1] ** 0.5).softmax(dim=-1)
        return weights.mean(dim=1).amax(dim=1)

    def read(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer at positions `[layers, heads, held]`, `[1, heads, held, D]`."""
        index = positions[layer][..., None]
        return tuple(
            x[layer].gather(1, index.expand(-1, -1, x[layer].shape[-1]))[None] for x in (self._keys, self._values)
        )
