"""The simulated model: its shape, its sentence tables, its learned gates and the layers that signals hook into."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile

import torch
from torch import Tensor

from skipkv_vllm.policies.gates import Gate, Gates
from skipkv_vllm.sentences import SentenceTables

LAYERS, KV_HEADS, Q_HEADS, DIM, HIDDEN = 2, 2, 4, 8, 6
GROUP = Q_HEADS // KV_HEADS
DOT, WORDS, VOCABULARY = 9, (1, 2, 3, 4, 5), 16
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
CPU = torch.device("cpu")


@functools.cache
def gates() -> Gates:
    """Return random gates for the simulated model; most tokens last about ten steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, HIDDEN), (5,), (KV_HEADS, 5), (KV_HEADS,))
    layers = [Gate(*(torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(LAYERS)]
    return Gates([gate._replace(bias2=gate.bias2 + 2) for gate in layers])


@functools.cache
def gates_file() -> str:
    """Return the path of a file with these gates."""
    folder = tempfile.mkdtemp(prefix="skipkv-gates-")
    atexit.register(shutil.rmtree, folder)
    gates().save(f"{folder}/gates.safetensors", {})
    return f"{folder}/gates.safetensors"


class FakeAttention:
    """Stands in for the attention implementation of a layer."""

    def forward(self, layer: object, query: Tensor) -> Tensor:
        return query


class FakeBlock(torch.nn.Module):
    """Stands in for an attention block."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states


def of_head(queries: Tensor, head: int) -> Tensor:
    """Return the queries `[..., group, D]` of a kv head, of queries `[..., Hq, D]`."""
    return queries[..., head * GROUP : (head + 1) * GROUP, :]
