"""The worker's part of steering: adds a vector to the input of a decoder layer at the tokens between two thoughts.

Which tokens are steered, and how strongly, is computed on the device from the step's token ids before the forward pass,
in buffers that compiled code and CUDA graphs read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..core.device import to_device
from ..core.errors import KVPolicyError
from ..core.orders import SteeredRequest
from ..steering.tables import ThoughtTables
from ..steering.vectors import SteeringVector
from .batch import RowSpans, StepBatch
from .requests import Rows

LAYER_INPUTS = ("positions", "hidden_states", "residual")
"""First parameters of a decoder layer that passes the residual stream on as a sum of two."""


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """Find the decoder layers of a model of vLLM by their signature, not by name.

    Raises:
        KVPolicyError: the model has no list of `num_layers` of them, or several.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and _are_decoder_layers(module)
    }
    if len(found) != 1:
        raise KVPolicyError(
            f"steering found {len(found)} lists of {num_layers} decoder layers in {type(model).__name__} "
            f"({', '.join(found) or 'none'}); it needs one whose layers take {', '.join(LAYER_INPUTS)}, as those of "
            "Qwen2, Qwen3 and Llama do. Start without --kv-steering-vectors"
        )
    return next(iter(found.values()))


def _are_decoder_layers(modules: nn.ModuleList) -> bool:
    # Under pipeline parallelism the layers of other stages are identities.
    present = [module for module in modules if not isinstance(module, nn.Identity)]
    return bool(present) and all(map(_is_decoder_layer, present))


def _is_decoder_layer(module: nn.Module) -> bool:
    return tuple(inspect.signature(module.forward).parameters)[: len(LAYER_INPUTS)] == LAYER_INPUTS


class Steering:
    """Coefficients of the step's tokens, the state of the steered requests, and the hooks that add the vectors.

    Args:
        tables: thought tables of the tokenizer.
        vectors: registered vectors; a request names one by its number, from 1.
        interval: number of positions after which the strength takes new thoughts into account.
        num_rows: requests that can run at once.
        max_tokens: tokens of the largest step.
        device: where the model runs.
        has_drafts: whether steps contain drafts, which may be rejected.

    Attributes:
        row: int32 `[max_tokens]`, row of each token's vector in the table; 0 steers nothing.
        coefficient: float32 `[max_tokens]`, strength at each token.
        state: int32, state of `ops.track_thoughts` by row of the request.
        committed: `state` before the step, with speculative decoding; else None.
        is_active: False in a step that steers no token. Compiled code and graphs add zeros all the same.
    """

    def __init__(
        self,
        tables: ThoughtTables,
        vectors: Sequence[SteeringVector],
        *,
        interval: int,
        num_rows: int,
        max_tokens: int,
        device: torch.device,
        has_drafts: bool = False,
    ) -> None:
        self._vectors = vectors
        self._vocabulary, self._keywords = tables.vocabulary.to(device), tables.keywords.to(device)
        self._merge, self._interval, self._device = tables.merge, interval, device
        self._track = ops.function("track_thoughts", device)
        self._add = ops.function("steer_add", device)
        self.row = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.coefficient = torch.zeros(max_tokens, dtype=torch.float32, device=device)
        self.state = torch.zeros(num_rows, len(ops.STATE), dtype=torch.int32, device=device)
        self.committed = torch.empty_like(self.state) if has_drafts else None
        self._drafted_row = torch.empty_like(self.row) if has_drafts else None
        self._drafted_coefficient = torch.empty_like(self.coefficient) if has_drafts else None
        self._strengths = torch.zeros(num_rows, 3, dtype=torch.float32, device=device)
        self._rows = Rows(num_rows)
        self._requests: dict[str, tuple[int, int]] = {}
        """request -> its row and the position of the first token that may be steered"""
        self.is_active = True
        # On a CPU the host may look at what was computed; most steps of a few requests steer no token.
        self._row_on_host = self.row.numpy() if device.type == "cpu" else None
        self._written = 0
        # Cached from the previous batch, which usually has not changed.
        self._request_ids: Sequence[str] | None = None
        self._steered = self._spans_of(())

    @property
    def num_rows(self) -> int:
        """Requests that can run at once."""
        return self._rows.number

    @property
    def nbytes(self) -> int:
        """Device memory of the buffers, without the vectors."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def attach(self, layers: nn.ModuleList) -> None:
        """Hook every layer that a vector belongs to. Call it before anything is compiled."""
        for index in sorted({vector.layer for vector in self._vectors}):
            width = self._vectors[0].hidden_size
            table = torch.zeros(len(self._vectors) + 1, width, dtype=torch.float32, device=self._device)
            for number, vector in enumerate(self._vectors, 1):
                if vector.layer == index:
                    table[number] = vector.values
            layer = layers[index]
            if isinstance(layer, nn.Identity):
                continue
            buffers = {"row": self.row, "coefficient": self.coefficient, "vectors": table}
            for name, buffer in buffers.items():
                layer.register_buffer(f"skipkv_{name}", buffer, persistent=False)
            layer.register_forward_pre_hook(functools.partial(self._before_layer, table), with_kwargs=True)

    def _before_layer(
        self, table: Tensor, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A layer is compiled once, for steps that steer and steps that do not, and reads registered buffers.
        if torch.compiler.is_compiling():
            add: Callable[..., Any] = torch.ops.skipkv.steer_add
            how = layer.skipkv_coefficient, layer.skipkv_row, layer.skipkv_vectors
        elif self.is_active:
            add, how = self._add, (self.coefficient, self.row, table)
        else:
            return None
        inputs = dict(zip(LAYER_INPUTS, args, strict=False)) | kwargs
        # The stream is the sum of the two; the first layer has no residual yet.
        name = "hidden_states" if inputs["residual"] is None else "residual"
        inputs[name] = add(inputs[name], *how)
        return args[len(LAYER_INPUTS) :], inputs

    # ---- a step

    def start(self, request: SteeredRequest) -> None:
        """Begin to steer a request."""
        row = self._rows.take(request.request_id)
        self._requests[request.request_id] = row, request.first
        self.state[row] = to_device(request.state, torch.int32, self._device)
        self._strengths[row] = to_device(request.strength, torch.float32, self._device)
        self._request_ids = None

    def forget(self, request_id: str) -> None:
        """Drop a request that ended or lost its cache, if it was steered."""
        if self._requests.pop(request_id, None) is not None:
            self._rows.release(request_id)
            self._request_ids = None

    def prepare(self, batch: StepBatch, token_ids: Tensor) -> None:
        """Compute the coefficients of the coming forward pass.

        Args:
            batch: its requests.
            token_ids: integer `[>= T]` on the device.
        """
        if not self._requests:
            self._rest()
            return
        if batch.request_ids != self._request_ids:
            self._request_ids = list(batch.request_ids)
            self._steered = self._spans_of(batch.request_ids)
        spans, num_tokens = self._steered.of(batch)
        if not num_tokens:
            self._rest()
            return
        if self.committed is not None:
            self.committed.copy_(self.state)
        self._read(token_ids, spans, self.row, self.coefficient, self._written)
        self._written = batch.num_tokens
        self.is_active = self._row_on_host is None or bool(self._row_on_host[: self._written].any())

    def accept(self, batch: StepBatch, token_ids: Tensor, num_rejected: Tensor) -> None:
        """Let the state follow the accepted tokens of a step only.

        Args:
            batch, token_ids: those of `prepare`.
            num_rejected: integer `[R]` on the device, the last tokens of each request.
        """
        if not self._written or self.committed is None:
            return
        spans, _ = self._steered.accepted(batch, num_rejected)
        self.state.copy_(self.committed)
        assert self._drafted_row is not None
        assert self._drafted_coefficient is not None
        self._read(token_ids, spans, self._drafted_row, self._drafted_coefficient, 0)

    def _read(self, token_ids: Tensor, spans: Tensor, row: Tensor, coefficient: Tensor, written: int) -> None:
        """Advance the state by the tokens of some spans, and compute how strongly each is steered."""
        tables = (self._vocabulary, self._keywords, self._merge, self._interval, self._strengths)
        self._track(token_ids, spans, *tables, self.state, written, row, coefficient)

    def prepare_dummy(self) -> None:
        """Get ready for a forward pass without requests, in which a graph may be captured."""
        self._rest()
        self.is_active = True

    def _rest(self) -> None:
        if self._written:
            self.row[: self._written].zero_()
            self._written = 0
        self.is_active = False

    def _spans_of(self, request_ids: Sequence[str]) -> RowSpans:
        places = [i for i, request_id in enumerate(request_ids) if request_id in self._requests]
        held = np.array([self._requests[request_ids[i]] for i in places], dtype=np.int64).reshape(-1, 2)
        return RowSpans(np.array(places, dtype=np.int64), held[:, 0], held[:, 1], self._device)
