"""Resident lengths and slots for the drafters of speculative decoding.

A drafter has layers of its own, whose KV lies in the same blocks, and decodes some tokens ahead of the model. vLLM
derives where it reads and writes from logical positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .resident import ResidentLengths


def request_of_token(starts: Tensor, num_tokens: int) -> Tensor:
    """Return the number of the request that each token belongs to, int64 `[T]`; the last one for padding.

    Args:
        starts: integer `[R + 1]` on the device, place of each request's first token, and the end of the last.
        num_tokens: T.
    """
    order = torch.arange(num_tokens, dtype=starts.dtype, device=starts.device)
    return torch.searchsorted(starts[1:], order, right=True).clamp_(max=len(starts) - 2)


class ResidentDrafter:
    """Hooks the drafter of Model Runner V1.

    Args:
        drafter: vLLM's, with layers.
        lengths: those of the model's attention in the coming step.
    """

    def __init__(self, drafter: Any, lengths: ResidentLengths) -> None:
        self._drafter, self._lengths = drafter, lengths
        self._propose, self._advance = drafter.propose, drafter._update_positions_dependent_metadata
        self._set_inputs = drafter.set_inputs_first_pass
        drafter.propose, drafter._update_positions_dependent_metadata = self.propose, self.advance
        if drafter.needs_extra_input_slots:
            drafter.set_inputs_first_pass = self.set_inputs

    def propose(self, *args: Any, common_attn_metadata: Any, **kwargs: Any) -> Any:
        """Propose drafts, from metadata with logical lengths."""
        # A copy, because vLLM takes rejected drafts off these lengths in place.
        resident = self._lengths.copied(common_attn_metadata)
        return self._propose(*args, common_attn_metadata=resident, **kwargs)

    def set_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Set the inputs of the first draft of a drafter that has one token more of each request than the model."""
        num_tokens, *others, common = self._set_inputs(*args, **kwargs)
        if self._lengths.evicted is not None:
            rows = request_of_token(common.query_start_loc, num_tokens)
            self._move(common.slot_mapping, common.block_table_tensor, rows, self._drafter.block_size)
        return num_tokens, *others, common

    def advance(self, positions: Tensor, common: Any, batch_size: int, input_batch_size: int, block_size: int) -> Any:
        """Go on to the next draft, one token of each request."""
        advanced = self._advance(positions, common, batch_size, input_batch_size, block_size)
        if self._lengths.evicted is not None:
            rows = torch.arange(batch_size, device=positions.device)
            self._move(self._drafter._slot_mapping_buffer, common.block_table_tensor, rows, block_size)
        return advanced

    def _move(self, slots: Tensor, table: Tensor, rows: Tensor, block_size: int) -> None:
        """Replace slots that follow from logical positions.

        Args:
            slots: integer `[>= T]`; a negative one is of a token that is stored nowhere.
            table: block ids `[R, blocks]`.
            rows: int64 `[T]`, number of each token's request.
            block_size: tokens of a block.
        """
        evicted, slots = self._lengths.evicted, slots[: len(rows)]
        assert evicted is not None
        drafter = self._drafter
        # Of several dimensions of a position the first one counts tokens.
        positions = drafter.mrope_positions[0] if drafter.uses_mrope else drafter.positions
        place = positions[: len(rows)] - evicted.device[rows]
        block = table[rows, place.clamp(min=0) // block_size].to(slots.dtype)
        slots.copy_(torch.where(slots < 0, slots, block * block_size + place % block_size))


class ResidentTables:
    """The block tables that a drafter of Model Runner V2 gets.

    Args:
        tables: the runner's.
        lengths: those of the drafter's attention.
        max_tokens: most tokens that it reads at once.
        device: where the model runs.
    """

    def __init__(self, tables: Any, lengths: ResidentLengths, max_tokens: int, device: torch.device) -> None:
        self._tables, self._lengths = tables, lengths
        self._positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    def compute_slot_mappings(
        self, requests: Tensor, starts: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Map logical positions, `[T]`, to slots; see vLLM's `BlockTables`."""
        evicted = self._lengths.evicted
        if evicted is not None:
            num_requests, num_tokens = len(evicted.host), positions.shape[0]
            resident = self._positions[:num_tokens]
            resident.copy_(positions)
            by_token = evicted.device
            if num_tokens > num_requests:
                by_token = by_token[request_of_token(starts[: num_requests + 1], num_tokens)]
            resident[: len(by_token)].sub_(by_token)
            positions = resident
        return self._tables.compute_slot_mappings(requests, starts, positions, *args, **kwargs)
