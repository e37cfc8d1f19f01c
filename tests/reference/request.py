"""Greedy generation of one request with eviction; the oracle decides itself when to compact and what survives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.methods import token_scores
from tests.reference.model import Model
from tests.reference.selection import TIE_TOLERANCE, arbitrate
from tests.reference.settings import EngineTrace, Event, Result, SelectionError, Settings
from tests.reference.state import State


def generate(
    model: Model, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace | None = None
) -> Result:
    """Generate greedily with eviction.

    Args:
        model: the model.
        prompt: token ids.
        num_new: tokens to generate; the end-of-text token does not stop them.
        settings: method and limits.
        trace: the engine's trace of the same request, read only to decide near ties.

    Raises:
        SelectionError: the engine's choice differs from the oracle's by more than a near tie.
    """
    return Request(model, prompt, settings, trace).run(num_new)


class Request:
    """One request; see `generate`."""

    tie_tolerance = TIE_TOLERANCE

    def __init__(self, model: Model, prompt: Sequence[int], settings: Settings, trace: EngineTrace | None) -> None:
        self._state = State(model, prompt, settings)
        self._settings = settings
        self._trace = trace
        self._result = Result([], alphas=self._state.alphas, sparsities=self._state.sparsities)
        if self._state.by_segment is not None:
            # Clusters of keys may come out differently in the last bits; the number of such tokens is still limited.
            self.tie_tolerance = float("inf")

    @torch.inference_mode()
    def run(self, num_new: int) -> Result:
        """Generate `num_new` tokens."""
        state = self._state
        first = self._settings.bound(state.num_prompt, is_first=True)
        # Segments of an unprotected prompt begin with it, and the last queries of each are needed.
        piece = first if state.by_segment is None or state.num_protected else state.by_segment["segment"]
        for start in range(0, min(first, state.num_prompt), piece):
            logits = state.feed(state.text[start : min(start + piece, first)])
        for token in state.text[first:]:
            self._compact_if_due()
            logits = state.feed([token])
        while True:
            token = self._choose(logits)
            self._result.tokens.append(token)
            self._result.logprobs.append(float(logits.log_softmax(-1)[token]))
            self._result.gaps.append(float(logits.max() - logits[token]))
            if len(self._result.tokens) == num_new:
                return self._result
            self._compact_if_due()
            state.text.append(token)
            logits = state.feed([token])

    def _choose(self, logits: Tensor) -> int:
        return int(logits.argmax())

    def _compact_if_due(self) -> None:
        state = self._state
        num_resident = state.num_resident
        is_at_bound = num_resident >= self._settings.bound(state.num_prompt, is_first=not self._result.events)
        if is_at_bound or self._settings.ends_prompt(state.num_prompt, state.num_computed, num_resident):
            scores = token_scores(state)
            survives = self._arbitrated(*state.select(scores))
            state.evict(survives)
            if state.recalled is not None:
                state.recall(scores[survives].view(state.positions.shape))
        elif self._result.events and self._settings.swaps(state.num_prompt, state.num_computed):
            state.recall()
        else:
            return
        self._result.events.append(Event(state.num_computed, num_resident, state.positions.clone()))
        if state.recalled is not None:
            self._check_recalled(self._result.events[-1])

    def _check_recalled(self, event: Event) -> None:
        """Check that the engine holds the same tokens; near ties are not decided its way here."""
        index = len(self._result.events) - 1
        if self._trace is None or index >= len(self._trace.kept):
            return
        where = f"event {index} at {event.num_logical} tokens"
        kept = self._trace.kept[index].long()
        if int(self._trace.logical_length[index]) != event.num_logical or kept.shape != event.kept.shape:
            at, shape = int(self._trace.logical_length[index]), tuple(kept.shape)
            raise SelectionError(
                f"{where}: the engine holds {shape} tokens at {at}, the oracle {tuple(event.kept.shape)}"
            )
        if differs := (kept != event.kept).any(-1).nonzero().tolist():
            layer, head = differs[0]
            own, other = set(event.kept[layer, head].tolist()), set(kept[layer, head].tolist())
            raise SelectionError(
                f"{where}: other tokens in {len(differs)} heads; in layer {layer}, head {head} the engine holds "
                f"{sorted(other - own)}, the oracle {sorted(own - other)}"
            )

    def _arbitrated(self, survives: Tensor, scores: Tensor) -> Tensor:
        """Return `survives` with near ties decided the engine's way, and count them."""
        layers, heads, _ = survives.shape
        num_computed, keep = self._state.num_computed, self._state.keep
        per_head = self._settings.granularity == "head"
        self._result.num_selected += keep * (layers * heads if per_head else 1)
        index = len(self._result.events)
        if self._trace is None or index >= len(self._trace.kept) or self._state.recalled is not None:
            return survives
        where = f"compaction {index} at {num_computed} tokens"
        kept = self._trace.kept[index].long()
        if int(self._trace.logical_length[index]) != num_computed or kept.shape != (layers, heads, keep):
            raise SelectionError(
                f"{where} to {keep}: the engine compacted at {int(self._trace.logical_length[index])} "
                f"to {tuple(kept.shape)}"
            )
        engine = torch.zeros(layers, heads, num_computed, dtype=torch.bool).scatter(2, kept, True)
        engine = engine.gather(2, self._state.positions)
        if not (engine.sum(-1) == keep).all():
            raise SelectionError(f"{where}: the engine kept tokens that it had evicted before")
        if not per_head and not (engine == engine[0, 0]).all():
            raise SelectionError(f"{where}: the engine's layers or heads kept different tokens")
        pinned = self._state.pinned()
        for layer in range(layers if per_head else 1):
            for head in range(heads if per_head else 1):
                one = (layer, head)
                self._result.num_ties += arbitrate(
                    *(survives[one], scores[one], pinned[one], engine[one], f"{where}, layer {layer}, head {head}"),
                    self.tie_tolerance,
                )
        return engine


class Replay(Request):
    """Follows an engine that rounds more than float32 does: takes its tokens and survivors, and measures the error."""

    tie_tolerance = float("inf")

    def __init__(
        self, model: Model, prompt: Sequence[int], settings: Settings, trace: EngineTrace, tokens: Sequence[int]
    ) -> None:
        super().__init__(model, prompt, settings, trace)
        self._tokens = tokens

    def _choose(self, logits: Tensor) -> int:
        return self._tokens[len(self._result.tokens)]
