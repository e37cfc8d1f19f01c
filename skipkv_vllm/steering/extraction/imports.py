"""Import vectors of other projects: `.pt` files of SEAL and SkipKV, and GGUF control vectors of llama.cpp.

They differ from ours in two ways that the files do not record. SEAL and SkipKV store reflection and transition minus
execution and use a negative coefficient; we store the opposite. Their layer, like ours, is the one whose *input* is
changed; llama.cpp adds `direction.N` to the *output* of layer N, which is the input of layer N + 1.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...core.errors import KVPolicyError
from ..vectors import SteeringVector, describe
from .checkpoints import Checkpoint

Sign = Literal["E-RT", "RT-E"]
FORMATS = {".pt": "RT-E", ".pth": "RT-E", ".gguf": "E-RT"}
"""File extension -> the sign that its projects use."""

_LAYER_IN_NAME = re.compile(r"layer_?(\d+)")
_DIRECTION = re.compile(r"direction\.(\d+)")


class Found(NamedTuple):
    """A vector as read from a file.

    Attributes:
        values: any float dtype, `[hidden size]`.
        layer: the layer whose input it is added to.
        source: where it came from.
    """

    values: Tensor
    layer: int
    source: str


def import_vector(
    path: Path, checkpoint: Checkpoint, layer: int | None = None, sign: Sign | None = None
) -> SteeringVector:
    """Import a vector of another project.

    Args:
        path: a `.pt` or `.gguf` file.
        checkpoint: the model it is for.
        layer: layer whose input it is added to; None to read it from the file.
        sign: direction of the vector; None for the usual one of the format.

    Raises:
        KVPolicyError: no such file, another format, a missing or contradictory layer, or a vector that does not fit
            the model.
    """
    if not path.is_file():
        raise KVPolicyError(f"{path}: there is no such file; give a .pt or .gguf file")
    if path.suffix not in FORMATS:
        raise KVPolicyError(f"{path} ends in {path.suffix!r}; supported formats: {', '.join(FORMATS)}")
    found = _read_gguf(path, layer) if path.suffix == ".gguf" else _read_pt(path, layer)
    checkpoint.check_layer(found.layer)
    if not found.values.is_floating_point() or list(found.values.shape) != [checkpoint.hidden_size]:
        raise KVPolicyError(
            f"{path} holds {describe(found.values)}, but {checkpoint.name} needs floats of shape "
            f"[{checkpoint.hidden_size}]; it was made for another model; give the model it was made for"
        )
    values = found.values.float()
    return SteeringVector(
        values=-values if (sign or FORMATS[path.suffix]) == "RT-E" else values,
        layer=found.layer,
        num_layers=checkpoint.num_layers,
        base_model=checkpoint.name,
        method=f"imported from {path.name} ({found.source})",
        tokenizer_sha=checkpoint.tokenizer_sha,
    )


def _read_pt(path: Path, layer: int | None) -> Found:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise KVPolicyError(
            f"{path} is not a file of plain tensors ({reason}); only tensors are read, save the vector alone"
        ) from None
    if not isinstance(content, Tensor):
        kind = type(content).__name__
        raise KVPolicyError(f"{path} holds a {kind}, not a tensor; save the vector of a single layer with torch.save")
    named = _LAYER_IN_NAME.search(path.stem)
    if named is not None and layer is not None and int(named[1]) != layer:
        raise KVPolicyError(
            f"--layer {layer} contradicts the file name {path.name}; give --layer {named[1]}, or rename the file"
        )
    if named is None and layer is None:
        raise KVPolicyError(f"the file name {path.name} does not contain the layer, like layer_20; give --layer")
    return Found(content, int(named[1]) if named else layer or 0, "SEAL's format")


def _read_gguf(path: Path, layer: int | None) -> Found:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise KVPolicyError("GGUF files need the package gguf: pip install 'skipkv-vllm[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise KVPolicyError(f"{path} is not a GGUF file ({error}); give a GGUF control vector") from None
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else None
    if architecture != "controlvector":
        raise KVPolicyError(f"{path} is a GGUF file of {architecture!r}, not of 'controlvector'; give a control vector")
    # direction.N is added to the output of layer N.
    entries = {int(m[1]) + 1: t for t in reader.tensors if (m := _DIRECTION.fullmatch(t.name))}
    if layer is None and len(entries) == 1:
        (layer,) = entries
    if layer not in entries:
        inputs = ", ".join(map(str, sorted(entries))) or "none"
        wanted = "name one with --layer" if layer is None else f"--layer {layer} is not one of them"
        raise KVPolicyError(
            f"{path} has vectors for the inputs of layers {inputs} (direction.N is the input of layer N + 1); {wanted}"
        )
    tensor = entries[layer]
    hint = reader.get_field("controlvector.model_hint")
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    return Found(values, layer, f"{tensor.name}, model hint {hint.contents() if hint else 'none'}")
