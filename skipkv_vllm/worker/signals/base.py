"""The protocol of everything that workers collect for policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...core.orders import Started
from ...policies.base import Segments
from ..batch import BatchRows, StepBatch
from ..cache import KVCache
from ..compaction_batch import CompactionBatch, Moves
from ..requests import ManagedRequest, Reading


class Step(NamedTuple):
    """The forward pass to come.

    Attributes:
        batch: its requests.
        rows: their rows, and what follows from these.
        records_queries: whether a query of this step will be needed.
    """

    batch: StepBatch
    rows: BatchRows
    records_queries: bool


class ForwardOutput(NamedTuple):
    """What a forward pass over T tokens produced.

    Attributes:
        token_ids: integer `[>= T]`, the step's input ids.
        slots: integer `[>= T]`, slot of each token in the cache.
        hidden: `[>= T, E]` last hidden states after the final norm; None except in a pipeline's last stage.
        logits: returns `[R, V]`, the logits of each request's last token; the same on every rank of a stage. None where
            no tokens are computed ahead.
        num_rejected: integer `[R]` on the device, how many of each request's last tokens were drafts that were
            rejected, with speculative decoding; else None.
    """

    token_ids: Tensor
    slots: Tensor
    hidden: Tensor | None = None
    logits: Callable[[], Tensor] | None = None
    num_rejected: Tensor | None = None


@dataclass
class Inputs:
    """What the signals know of the requests of a compaction. N slots; only what the policy needs is set.

    Attributes:
        queries: the last W queries `[R, layers, W, Hq, D]`, oldest first.
        penalties: float32 `[R, layers, H, N]`, how much later text repeats the sentence of each token.
        sums: float32 `[K, R, layers, H, N]`: attention mass, or output error and number of queries.
        segments: `[R, S]`, after `Policy.remember`.
        gates: float32 `[R, layers, H, N]`.
    """

    queries: Tensor | None = None
    penalties: Tensor | None = None
    sums: Tensor | None = None
    segments: Segments | None = None
    gates: Tensor | None = None


class Signal:
    """Something that is collected for every managed request. The hooks of a step are called in this order.

    A signal keeps its state by row, in buffers that live as long as the runtime. No hook makes the host wait for the
    device. Hooks that a signal does not override do nothing.
    """

    @property
    def nbytes(self) -> int:
        """Device memory allocated up front, without entries per slot of the cache."""
        return 0

    def bind_cache(self, cache: KVCache) -> None:
        """Take the KV cache once vLLM has allocated it."""

    def forget(self, row: int) -> None:
        """Drop the state of a row: its request ended, was preempted or starts over."""

    def accumulate(self, readings: Sequence[Reading]) -> None:
        """Measure the attention of recent queries, with the blocks as they are before this step's compactions."""

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        """Set the inputs that the policy of a batch needs. Every rank calls it, in the same order."""

    def move(self, batch: CompactionBatch, inputs: Inputs, moves: Moves) -> None:
        """Follow a compaction that was carried out."""

    def start(self, request: ManagedRequest, order: Started) -> None:
        """Set up a row, which was cleared, for a request."""

    def prepare(self, step: Step) -> None:
        """Get ready for a forward pass; compiled code and CUDA graphs read the buffers that this fills."""

    def prepare_dummy(self) -> None:
        """Get ready for a forward pass without requests: profiling, graph capture, idle data-parallel rank."""

    def after_forward(self, step: Step, output: ForwardOutput) -> None:
        """Read what the forward pass produced; with speculative decoding once it is known which drafts are accepted."""
