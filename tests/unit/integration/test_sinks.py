"""Logits of attention sinks, as they are read from a model's layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipkv_vllm.integration.build import _sink_logits_of


def layer(sinks: Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(impl=SimpleNamespace(sinks=sinks), num_heads=3, kv_cache=torch.empty(0))


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_a_model_without_sinks_has_none():
    assert _sink_logits_of([layer(None), SimpleNamespace(impl=object())]) is None


def test_weights_that_change_or_are_replaced_are_read_anew():
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    layers = [layer(weight), layer(None), layer(weight + 1)]
    read = _sink_logits_of(layers)
    assert read is not None
    none = [-torch.inf] * 3
    assert read().tolist() == [[1, 2, 3], none, [2, 3, 4]]
    assert read().dtype is torch.float32
    weight += 4  # loaded anew
    layers[2].impl.sinks = torch.tensor([7.25, 8, 9])  # by a backend that wants another dtype
    assert read().tolist() == [[5, 6, 7], none, [7.25, 8, 9]]


def test_reading_many_layers_takes_few_launches():
    read = _sink_logits_of([layer(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(40)])
    assert read is not None
    with Launches() as launches:
        read()
    assert launches.number <= 4
