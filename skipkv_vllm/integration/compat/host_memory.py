"""Host memory that kernels of the device read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros in host memory and return them as a tensor on the device."""
    if device.type == "cpu":
        return torch.zeros(shape, dtype=dtype)
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    # The view keeps the memory alive.
    return get_accelerator_view_from_cpu_tensor(torch.zeros(shape, dtype=dtype, pin_memory=True))
