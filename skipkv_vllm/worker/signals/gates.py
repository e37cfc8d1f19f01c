"""Learned gates: their output for every token when it is written, kept beside its KV.

A hook in front of each attention block lets the layer's gate read the input of the block. The outputs of a step land in
buffers that compiled code and CUDA graphs write; after the forward pass they go to the slots of the step's tokens. They
are kept by slot and for every request's tokens, whatever its policy, so that blocks of the prefix cache have them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import KVPolicyError
from ...core.needs import Need
from ...ops.gates import check_activation, token_gates
from ...policies.gates import INPUT, Gate
from ..cache import KVCache
from ..compaction_batch import CompactionBatch, Moves
from .base import ForwardOutput, Inputs, Signal, Step


def attention_blocks(model: nn.Module, layers: Mapping[str, Any]) -> list[nn.Module]:
    """Return the modules that contain the attention layers, which are given by name in model order.

    Raises:
        KVPolicyError: a module whose input is unknown.
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    blocks = []
    for name, layer in layers.items():
        block = parents.get(id(layer))
        if block is None or INPUT not in inspect.signature(block.forward).parameters:
            found = "no module" if block is None else f"a {type(block).__name__}, which does not take {INPUT}"
            raise KVPolicyError(
                f"learned gates read what enters an attention block, but {name} of {type(model).__name__} is part of "
                f"{found}; use a --kv-policy without gates"
            )
        blocks.append(block)
    return blocks


class TokenGates(Signal):
    """The gates of this rank's layers and heads, and their output for each held token.

    Args:
        gates: of this rank's layers, with all kv heads of the model.
        first_head, num_heads: this rank's kv heads.
        activation: name of the model's activation, which the gates share.
        max_tokens: tokens of the largest step.
        dtype: dtype of the model.
        device: where the model runs.

    Raises:
        KVPolicyError: unknown activation.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        *,
        first_head: int,
        num_heads: int,
        activation: str,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_activation(activation)
        own, self._activation = slice(first_head, first_head + num_heads), activation
        self._weights = [
            Gate(
                gate.weight1.to(device, dtype),
                gate.bias1.to(device, dtype),
                gate.weight2[own].to(device, torch.float32),
                gate.bias2[own].to(device, torch.float32),
            )
            for gate in gates
        ]
        # A tensor of its own for each layer: compiled code may not write two views of one.
        self._outputs = [torch.zeros(max_tokens, num_heads, dtype=torch.float32, device=device) for _ in gates]
        self._num_tokens = 0
        self._entries = torch.empty(0)
        self._page_size = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._outputs, *(t for gate in self._weights for t in gate)))

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Put a hook on the attention block of each layer. Call it before anything is compiled."""
        for i, (block, gate) in enumerate(zip(blocks, self._weights, strict=True)):
            for name, buffer in {**gate._asdict(), "output": self._outputs[i]}.items():
                block.register_buffer(f"skipkv_gate_{name}", buffer, persistent=False)
            place = list(inspect.signature(block.forward).parameters).index(INPUT)
            block.register_forward_pre_hook(functools.partial(self._before_block, i, place), with_kwargs=True)

    def _before_block(self, index: int, place: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs[INPUT] if INPUT in kwargs else args[place]
        if torch.compiler.is_compiling():
            gate = (block.skipkv_gate_weight1, block.skipkv_gate_bias1, block.skipkv_gate_weight2)
            torch.ops.skipkv.token_gates(
                hidden, *gate, block.skipkv_gate_bias2, self._activation, block.skipkv_gate_output
            )
        else:
            token_gates(hidden, *self._weights[index], self._activation, self._outputs[index])

    def bind_cache(self, cache: KVCache) -> None:
        """Allocate one entry per slot: float32 `[layers, slots, H]`."""
        num_layers, num_pages, heads, self._page_size = cache.sidecar.shape
        shape = (num_layers, num_pages * self._page_size, heads)
        self._entries = torch.zeros(shape, dtype=torch.float32, device=cache.device)

    def prepare(self, step: Step) -> None:
        self._num_tokens = step.batch.num_tokens

    def prepare_dummy(self) -> None:
        self._num_tokens = 0

    def after_forward(self, step: Step, output: ForwardOutput) -> None:
        self.store(output.slots)

    def store(self, slots: Tensor) -> None:
        """Keep the outputs of the forward pass that ran.

        Args:
            slots: integer `[>= T]`, slot of each token in the cache.
        """
        count, self._num_tokens = self._num_tokens, 0
        if count:
            self._entries[:, slots[:count].long()] = torch.stack([output[:count] for output in self._outputs])

    def read(self, batch: CompactionBatch, inputs: Inputs) -> None:
        if batch.needs & Need.GATES:
            inputs.gates = self.by_slot(batch.source_table, batch.length)

    def by_slot(self, table: Tensor, length: int) -> Tensor:
        """Return the outputs for the tokens of R requests by slot, float32 `[R, layers, H, length]`.

        Args:
            table: integer `[R, pages]` page ids, padded with any page.
            length: resident length of the longest request; entries beyond a shorter request's tokens are arbitrary.
        """
        by_page = self._entries.unflatten(1, (-1, self._page_size))[:, table.long()]  # [layers, R, pages, P, H]
        return by_page.flatten(2, 3)[:, :, :length].permute(1, 0, 3, 2)

    def move(self, batch: CompactionBatch, inputs: Inputs, moves: Moves) -> None:
        if inputs.gates is None:
            return
        # Slots past a request's last kept one stand for that one, so every request has equally many.
        most = torch.arange(max(order.num_keep for order, _ in batch.jobs), device=inputs.gates.device)
        slot = most.minimum(batch.num_keep[:, None].long() - 1)  # [R, K]
        page = batch.target_table.long().gather(1, slot // self._page_size)
        kept = moves.follow(inputs.gates, batch.num_keep)
        kept = kept.gather(-1, slot[:, None, None].expand(*kept.shape[:-1], -1))
        to = (page * self._page_size + slot % self._page_size).flatten()
        self._entries[:, to] = kept.permute(1, 0, 3, 2).flatten(1, 2)
