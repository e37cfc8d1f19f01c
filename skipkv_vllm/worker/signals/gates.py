"""Learned gates at work: what they say of every token when it is written, kept beside its KV.

A hook in front of each attention block lets the layer's gate read what the block reads. The numbers of a step land in
buffers that compiled code and CUDA graphs write; after the forward pass they go to the slots of the step's tokens. They
are kept by slot and for every request's tokens, whatever its policy, so that a page that is found in the prefix cache
has them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import KVPolicyError
from ...ops.gates import check_activation, token_gates
from ...ops.paging import PagedCache
from ...policies.gates import INPUT, Gate


def attention_blocks(model: nn.Module, layers: Mapping[str, Any]) -> list[nn.Module]:
    """The modules that attention layers, by name and in model order, are part of.

    Raises:
        KVPolicyError: one whose input cannot be told.
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


class TokenGates:
    """The gates of this rank's layers and heads, and what they said of each held token.

    Args:
        gates: of this rank's layers, with all kv heads of the model.
        first_head, num_heads: this rank's kv heads.
        activation: name of the model's activation, which the gates share.
        max_tokens: tokens of the largest step.
        dtype: of the model.
        device: where the model runs.

    Raises:
        KVPolicyError: an activation that is not known.
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
        self._said = [torch.zeros(max_tokens, num_heads, dtype=torch.float32, device=device) for _ in gates]
        self._num_said = 0
        self._entries = torch.empty(0)
        self._page_size = 0

    @property
    def nbytes(self) -> int:
        """Device memory beside the entries of the cache's slots."""
        return sum(t.nbytes for t in (*self._said, *(t for gate in self._weights for t in gate)))

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Put a hook on the attention block of each layer. Call it before anything is compiled."""
        for i, (block, gate) in enumerate(zip(blocks, self._weights, strict=True)):
            for name, buffer in {**gate._asdict(), "said": self._said[i]}.items():
                block.register_buffer(f"skipkv_gate_{name}", buffer, persistent=False)
            place = list(inspect.signature(block.forward).parameters).index(INPUT)
            block.register_forward_pre_hook(functools.partial(self._before_block, i, place), with_kwargs=True)

    def _before_block(self, index: int, place: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs[INPUT] if INPUT in kwargs else args[place]
        if torch.compiler.is_compiling():
            gate = (block.skipkv_gate_weight1, block.skipkv_gate_bias1, block.skipkv_gate_weight2)
            torch.ops.skipkv.token_gates(
                hidden, *gate, block.skipkv_gate_bias2, self._activation, block.skipkv_gate_said
            )
        else:
            token_gates(hidden, *self._weights[index], self._activation, self._said[index])

    def bind_cache(self, cache: PagedCache) -> None:
        """Make room for an entry a slot: float32 `[layers, slots, H]`."""
        pages, heads, self._page_size, _ = cache.caches[0].shape
        device = cache.caches[0].device
        shape = (len(cache.caches), pages * self._page_size, heads)
        self._entries = torch.zeros(shape, dtype=torch.float32, device=device)

    def prepare(self, num_tokens: int) -> None:
        """The coming forward pass has so many tokens; 0 where it is a dummy."""
        self._num_said = num_tokens

    def store(self, slots: Tensor) -> None:
        """Keep what was said in the forward pass that ran.

        Args:
            slots: integer `[>= T]`, where the KV of each token went.
        """
        count, self._num_said = self._num_said, 0
        if count:
            self._entries[:, slots[:count].long()] = torch.stack([said[:count] for said in self._said])

    def read(self, table: Tensor, length: int) -> Tensor:
        """What was said of the tokens of R requests by slot, float32 `[R, layers, H, length]`.

        Args:
            table: integer `[R, pages]` page ids, padded with any page.
            length: resident length of the longest request; what lies past a shorter one's means nothing.
        """
        by_page = self._entries.unflatten(1, (-1, self._page_size))[:, table.long()]  # [layers, R, pages, P, H]
        return by_page.flatten(2, 3)[:, :, :length].permute(1, 0, 3, 2)

    def move(self, held: Tensor, table: Tensor, num_keep: int, source: Tensor, hole: Tensor, valid: Tensor) -> None:
        """Follow a compaction; the moves are those of `ops.move_list`.

        Args:
            held: `[layers, H, N]` by slot, before; N is above `num_keep`.
            table: integer `[pages]` page ids after it.
        """
        # Padding goes to a place beyond the kept ones.
        kept = held.scatter(-1, torch.where(valid, hole, num_keep), held.gather(-1, source))[..., :num_keep]
        order = torch.arange(num_keep, device=table.device)
        slots = table.long()[order // self._page_size] * self._page_size + order % self._page_size
        self._entries[:, slots] = kept.transpose(1, 2)
