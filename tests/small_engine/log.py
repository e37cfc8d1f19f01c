"""Every token of the running requests as the model computed it, on the device, whatever the cache still holds."""

from __future__ import annotations

import torch

from tests.small_engine.buffers import Placed
from tests.small_engine.model import Activations
from tests.small_engine.shape import Shape


class Log:
    """Tensors by row and logical position; a request that starts over writes them anew.

    Args:
        shape: sizes.

    Attributes:
        queries: `[rows, layers, max_length, Hq, D]`.
        keys, values: `[rows, layers, max_length, H, D]`.
        hidden: last hidden states, `[rows, max_length, E]`.
    """

    def __init__(self, shape: Shape) -> None:
        size = (shape.max_requests, shape.layers, shape.max_length)

        def empty(*sizes: int) -> torch.Tensor:
            return torch.zeros(*sizes, dtype=shape.dtype, device=shape.device)

        self.queries = empty(*size, shape.query_heads, shape.head_size)
        self.keys, self.values = (empty(*size, shape.kv_heads, shape.head_size) for _ in range(2))
        self.hidden = empty(shape.max_requests, shape.max_length, shape.width)
        self._layer = torch.arange(shape.layers, device=shape.device)

    def write(self, placed: Placed, computed: Activations) -> None:
        """Write the tokens of a step; padding behind them is left out."""
        rows, positions = placed
        number = rows.shape[0]
        for entries, found in (
            (self.queries, computed.queries),
            (self.keys, computed.keys),
            (self.values, computed.values),
        ):
            entries[rows[:, None], self._layer, positions[:, None]] = found[:, :number].transpose(0, 1)
        self.hidden[rows, positions] = computed.hidden[:number]

    def share(self, row: int, parent: int, length: int) -> None:
        """Take the first tokens of another request over, as from a prefix cache, which keeps no queries."""
        self.keys[row, :, :length] = self.keys[parent, :, :length]
        self.values[row, :, :length] = self.values[parent, :, :length]
        self.hidden[row, :length] = self.hidden[parent, :length]
