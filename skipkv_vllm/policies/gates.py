"""Learned gates and their file: per layer, a small network that predicts how long a token will matter.

`log beta = logsigmoid(W2 act(W1 h + b1) + b2)` is computed when the token is written, one number per kv head. h is the
normalised input of the layer's attention block (TRIM-KV, arXiv 2512.03324). The tensors of layer i have the names of
the published checkpoints:

    | tensor | shape | here |
    |---|---|---|
    | `model.layers.{i}.self_attn.retention_gate.linear1.weight` | `[width, hidden size]` | W1 |
    | `model.layers.{i}.self_attn.retention_gate.linear1.bias` | `[width]` | b1 |
    | `model.layers.{i}.self_attn.retention_gate.linear2.weight` | `[kv heads, width]` | W2 |
    | `model.layers.{i}.self_attn.retention_gate.bias` | `[kv heads]` | b2 |

Files are safetensors or PyTorch's (`.pth`, `.pt`), the format of those checkpoints. From PyTorch's only tensors are
read.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..core.errors import KVPolicyError
from ..core.files import atomic_replace

PREFIX = "model.layers.{}.self_attn.retention_gate."
INPUT = "hidden_states"
"""Argument of an attention block that is the input of the gates."""
PYTORCH_FILES = (".pth", ".pt")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = re.compile(re.escape(PREFIX).replace(r"\{\}", r"(\d+)") + r"(.+)")


class Gate(NamedTuple):
    """The gate of one layer, for H kv heads: W1 `[width, E]`, b1 `[width]`, W2 `[H, width]`, b2 `[H]`."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


TENSORS = ("linear1.weight", "linear1.bias", "linear2.weight", "bias")
"""Names within a layer, in the order of `Gate`."""


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a model, on the CPU.

    Attributes:
        layers: one gate per layer, all of the same shapes.
        source: where the gates come from, for messages.
    """

    layers: Sequence[Gate]
    source: str = "gates"

    def __post_init__(self) -> None:
        if not self.layers:
            raise KVPolicyError(f"{self.source} holds no gates; give a file with tensors {PREFIX.format(0)}...")
        width, hidden = self.layers[0].weight1.shape if self.layers[0].weight1.dim() == 2 else (0, 0)
        heads = len(self.layers[0].weight2) if self.layers[0].weight2.dim() == 2 else 0
        wanted = ((width, hidden), (width,), (heads, width), (heads,))
        for i, gate in enumerate(self.layers):
            for name, tensor, shape in zip(TENSORS, gate, wanted, strict=True):
                if tuple(tensor.shape) != shape or not all(shape):
                    raise KVPolicyError(
                        f"{self.source}: {PREFIX.format(i)}{name} has shape {list(tensor.shape)}, but the other "
                        f"tensors need {list(shape)}; the file is damaged or of another kind"
                    )
                if tensor.dtype not in DTYPES:
                    raise KVPolicyError(
                        f"{self.source}: {PREFIX.format(i)}{name} is {_dtype(tensor.dtype)}; allowed: "
                        f"{', '.join(map(_dtype, DTYPES))}; convert it"
                    )
                if not tensor.isfinite().all():
                    raise KVPolicyError(
                        f"{self.source}: {PREFIX.format(i)}{name} is not finite everywhere; train the gates again"
                    )

    @property
    def width(self) -> int:
        """Units of the hidden layer."""
        return self.layers[0].weight1.shape[0]

    @property
    def hidden_size(self) -> int:
        """Hidden size of the model."""
        return self.layers[0].weight1.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Number of kv heads of the model."""
        return self.layers[0].bias2.shape[0]

    def check_fits(self, *, hidden_size: int, num_layers: int, num_kv_heads: int) -> None:
        """Raise `KVPolicyError` unless the gates fit a model of this shape."""
        for what, mine, other in (
            ("hidden size", self.hidden_size, hidden_size),
            ("number of layers", len(self.layers), num_layers),
            ("number of kv heads", self.num_kv_heads, num_kv_heads),
        ):
            if mine != other:
                raise KVPolicyError(
                    f"{self.source} was made for a model whose {what} is {mine}, but this model's is {other}; give "
                    "gates that were trained for this model"
                )

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
        """Write a safetensors file with the given metadata; an older file is replaced in one piece."""
        tensors = {
            PREFIX.format(i) + name: tensor.contiguous()
            for i, gate in enumerate(self.layers)
            for name, tensor in zip(TENSORS, gate, strict=True)
        }
        with atomic_replace(Path(path)) as partial:
            partial.write_bytes(save(tensors, dict(metadata)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gates:
        """Read a file.

        Raises:
            KVPolicyError: no such file, another format, or missing, unknown or inconsistent tensors.
        """
        path = Path(path).expanduser()
        tensors = _read(path)
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            found = _NAME.fullmatch(name)
            if found is None or found[2] not in TENSORS:
                raise KVPolicyError(
                    f"{path}: {name!r} is not a tensor of a gate with two layers; a gate has {PREFIX.format('N')} with "
                    f"{', '.join(TENSORS)}; rename the tensors, or give another file"
                )
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        for i in range(max(layers, default=-1) + 1):
            if missing := [name for name in TENSORS if name not in layers.get(i, {})]:
                raise KVPolicyError(
                    f"{path}: {PREFIX.format(i)}{missing[0]} is missing; the file is incomplete, give a complete one"
                )
        gates = [Gate(*(layers[i][name] for name in TENSORS)) for i in range(len(layers))]
        return cls(gates, str(path))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise KVPolicyError(f"gates {str(path)!r}: there is no such file; give the path of the model's gates")
    try:
        if path.suffix not in PYTORCH_FILES:
            return load_file(path)
        held = dict(torch.load(path, map_location="cpu", weights_only=True))
        if others := [name for name, value in held.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"{others[0]!r} is not a tensor")
        return held
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KVPolicyError(
            f"gates {str(path)!r} cannot be read ({reason}); give a safetensors file, or a PyTorch file "
            f"({', '.join(PYTORCH_FILES)})"
        ) from None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
