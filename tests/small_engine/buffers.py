"""What a forward pass reads: persistent tensors that are filled before each step, so that graphs can read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipkv_vllm.core.device import to_device
from skipkv_vllm.core.limits import ceil_div
from tests.small_engine.shape import Shape


class Inputs(NamedTuple):
    """The inputs of a forward pass over T tokens of R requests, padding included; parts of persistent buffers.

    Attributes:
        token_ids: int32 `[T]`.
        positions: int64 `[T]`, logical.
        slots: int64 `[T]`, slot of each token in the cache.
        reach: int32 `[T]`, tokens of its request that each token attends to, itself included.
        place: int64 `[T]`, place of its request in the batch.
        starts: int32 `[R + 1]`, first token of each request.
        lengths: int32 `[R]`, tokens held of each request after the step.
        table: int32 `[R, pages]`, kernel pages.
        longest: most tokens of one request in this step.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    reach: Tensor
    place: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor
    longest: int


class Filling(NamedTuple):
    """The numbers of a step, of R requests and T tokens, as the host has them.

    Attributes:
        counts: int64 `[R]`, tokens of each request.
        starts: int64 `[R]`, logical position of each one's first token.
        rows: int64 `[R]`, where their texts lie.
        blocks: block ids of each request.
    """

    counts: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    blocks: list[list[int]]


class Placed(NamedTuple):
    """The tokens of a step without padding: row of each one's text and logical position, int64 `[T]` on the device."""

    rows: Tensor
    positions: Tensor


class Buffers:
    """The persistent tensors.

    Args:
        shape: sizes.

    Attributes:
        text: int64 `[requests, max_length + 1]`, token ids of running requests by row, read and sampled.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape, device = shape, shape.device
        tokens, requests = shape.max_tokens, shape.max_requests
        self._table_width = ceil_div(shape.max_length, shape.block_size) * shape.ratio
        self.text = torch.zeros(requests, shape.max_length + 1, dtype=torch.int64, device=device)
        self._positions, self._slots, self._place = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._token_ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._reach = torch.ones(tokens, dtype=torch.int32, device=device)
        self._starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._lengths = torch.ones(requests, dtype=torch.int32, device=device)
        self._table = torch.zeros(requests, self._table_width, dtype=torch.int32, device=device)

    @property
    def table_length(self) -> int:
        """Tokens that a table has room for."""
        return self._table_width * self._shape.page_size

    def take(self, num_tokens: int, num_requests: int, longest: int) -> Inputs:
        """Return the first parts of the buffers; one token a request if `longest` is 1."""
        return Inputs(
            self._token_ids[:num_tokens],
            self._positions[:num_tokens],
            self._slots[:num_tokens],
            self._reach[:num_tokens],
            self._place[:num_tokens],
            self._starts[: num_requests + 1],
            self._lengths[:num_requests],
            self._table[:num_requests],
            longest,
        )

    def fill(self, step: Filling, evicted: Tensor | None, inputs: Inputs) -> Placed:
        """Set the inputs of a step; padding names the first slot of the cache, which no request owns.

        Args:
            step: its numbers.
            evicted: int32 `[R]` on the device, as the runtime returned it; None if no request has evicted any token.
            inputs: of the step, at least as many tokens and requests as it has.
        """
        num_requests, total = len(step.counts), int(step.counts.sum())
        ends = step.counts.cumsum()
        place = np.repeat(np.arange(num_requests), step.counts)
        positions = np.arange(total) - np.repeat(ends - step.counts, step.counts) + np.repeat(step.starts, step.counts)
        numbers = to_device(np.array([place, positions, step.rows[place]]), torch.int64, self._shape.device)
        placed, position, row = numbers.unbind()
        resident = position if evicted is None else position - evicted.long()[placed]
        padded = len(inputs.lengths)
        self._set_table(step.blocks, padded)
        page = inputs.table.long()[placed, resident // self._shape.page_size]
        for buffer, values, padding in (
            (inputs.token_ids, self.text[row, position], 1),
            (inputs.positions, position, 0),
            (inputs.slots, page * self._shape.page_size + resident % self._shape.page_size, 0),
            (inputs.reach, resident + 1, 1),
            (inputs.place, placed, padded - 1),
        ):
            buffer[:total].copy_(values)
            buffer[total:].fill_(padding)
        last = to_device(ends - 1, torch.int64, self._shape.device)
        inputs.lengths[:num_requests].copy_(inputs.reach[last])
        inputs.lengths[num_requests:].fill_(1)
        # Of padding, each request has one token.
        bounds = np.concatenate([[0], ends, total + 1 + np.arange(padded - num_requests)])
        inputs.starts.copy_(to_device(bounds, torch.int32, self._shape.device), non_blocking=True)
        return Placed(row, position)

    def _set_table(self, blocks: list[list[int]], padded: int) -> None:
        ratio = self._shape.ratio
        table = np.zeros((padded, self._table_width), dtype=np.int32)
        for r, own in enumerate(blocks):
            pages = np.array(own, dtype=np.int32)[:, None] * ratio + np.arange(ratio, dtype=np.int32)
            table[r, : pages.size] = pages.ravel()
        self._table[:padded].copy_(to_device(table, torch.int32, self._shape.device), non_blocking=True)
