"""Copies from host to device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy host numbers to a device tensor without blocking the host."""
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return rows of numbers as an int32 array, padded with 0."""
    array = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for r, row in enumerate(rows):
        array[r, : len(row)] = row
    return array
