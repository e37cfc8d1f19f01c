"""Steering vectors and their file format: safetensors with one float32 tensor `vector` and metadata.

A vector points from reflection and transition thoughts to execution thoughts (E - RT), so a positive coefficient makes
a model doubt less. It is added to the input of a decoder layer (`hidden_states[layer]` in Hugging Face). It is not
normalised: its norm is the distance between the two class means, and coefficients are multiples of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import KVPolicyError
from ..core.files import atomic_replace

FORMAT_VERSION = "1"
SITE = "layer_input"
SIGN = "E-RT"
TENSOR = "vector"
NORM_TOLERANCE = 1e-3

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringVector:
    """A steering vector and the model and layer it was made for.

    Attributes:
        values: float32 `[hidden size]` on the CPU, execution minus the rest, not normalised.
        layer: decoder layer whose input it is added to, from 0.
        num_layers: decoder layers of that model.
        base_model: name or folder of the model it was made from.
        method: how it was made.
        keyword_set: the keywords that classified the thoughts.
        execution, reflection, transition: number of thoughts averaged, by class; None if unknown.
        split_half_cosine: cosine between the vectors of two halves of the reasoning texts; None if unknown.
        tokenizer_sha: see `tokenizer_digest`; None if unknown.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    values: Tensor
    layer: int
    num_layers: int
    base_model: str
    method: str
    keyword_set: str = "unknown"
    execution: Count | None = None
    reflection: Count | None = None
    transition: Count | None = None
    split_half_cosine: float | None = None
    tokenizer_sha: str | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.values.dim() != 1 or not self.values.numel():
            raise KVPolicyError(
                f"a steering vector must be float32 of shape [hidden size], not {describe(self.values)}; "
                "`skipkv import-vector` converts other formats"
            )
        if not math.isfinite(self.norm) or self.norm == 0:
            raise KVPolicyError(f"a steering vector of norm {self.norm} has no effect; make it again")
        if not 0 <= self.layer < self.num_layers:
            raise KVPolicyError(
                f"layer={self.layer} is out of range for a model of {self.num_layers} layers; "
                f"allowed: 0 to {self.num_layers - 1}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return self.values.numel()

    @property
    def norm(self) -> float:
        """Euclidean length, summed in float64."""
        return float(self.values.double().norm())

    def check_fits(self, hidden_size: int, num_layers: int, tokenizer_sha: str | None = None) -> None:
        """Raise `KVPolicyError` unless the vector fits this width, depth and, if both are known, tokenizer."""
        mine = {"hidden size": self.hidden_size, "number of layers": self.num_layers}
        for what, other in {"hidden size": hidden_size, "number of layers": num_layers}.items():
            if mine[what] != other:
                raise KVPolicyError(
                    f"the steering vector was made for {self.base_model}, whose {what} is {mine[what]}, but this "
                    f"model's is {other}; make one for this model with `skipkv extract-vector`"
                )
        if None not in (tokenizer_sha, self.tokenizer_sha) and tokenizer_sha != self.tokenizer_sha:
            raise KVPolicyError(
                f"the steering vector was made for {self.base_model} with another tokenizer (digest "
                f"{self.tokenizer_sha}, here {tokenizer_sha}); make one for this model with `skipkv extract-vector`"
            )

    def with_values(self, values: Tensor, method: str) -> SteeringVector:
        """Return a copy with other values, without the counts of the old ones."""
        return replace(
            self, values=values, method=method, execution=None, reflection=None, transition=None, split_half_cosine=None
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, replacing an older one atomically.

        Raises:
            KVPolicyError: the path is a folder, or its folder does not exist or cannot be written.
        """
        path = Path(path)
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "values"}
        metadata = {name: str(value) for name, value in known.items() if value is not None}
        metadata |= {"format_version": FORMAT_VERSION, "site": SITE, "sign": SIGN}
        metadata |= {"hidden_size": str(self.hidden_size), "norm": repr(self.norm)}
        if path.is_dir():
            raise KVPolicyError(f"cannot write the steering vector {path}: it is a folder; name a file in it")
        try:
            with atomic_replace(path) as partial:
                # save_file would make a file that only its owner can read.
                partial.write_bytes(save({TENSOR: self.values.contiguous()}, metadata))
        except (OSError, SafetensorError) as error:
            raise KVPolicyError(f"cannot write the steering vector {path} ({error}); choose another path") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Read a file.

        Raises:
            KVPolicyError: no such file, another format, version, sign or site, or a tensor that contradicts the
                metadata.
        """
        values, metadata = _read(Path(path))
        version = metadata.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise KVPolicyError(
                f"{path} has format_version={version!r}, this package reads {FORMAT_VERSION!r}; "
                "make it again with `skipkv extract-vector` or `skipkv import-vector`"
            )
        for field, value in {"site": SITE, "sign": SIGN}.items():
            if (found := metadata.pop(field, None)) != value:
                raise KVPolicyError(f"{path} has {field}={found!r}; only {value!r} is supported, make it again")
        size, norm = metadata.pop("hidden_size", None), metadata.pop("norm", None)
        known = {f.name: metadata[f.name] for f in fields(cls) if f.name in metadata}
        try:
            vector = TypeAdapter(cls).validate_python({**known, "values": values})
        except ValidationError as error:
            details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".strip(": ") for e in error.errors())
            raise KVPolicyError(f"{path} is not a usable steering vector: {details}") from None
        if size != str(vector.hidden_size) or not _is_close(norm, vector.norm):
            raise KVPolicyError(
                f"{path} says hidden_size={size}, norm={norm}, but its vector has {vector.hidden_size} and "
                f"{vector.norm}; the file was modified or is damaged, make it again"
            )
        return vector


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "there is no such file"
        raise KVPolicyError(f"steering vector {path}: {what}; make one with `skipkv extract-vector`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = dict(file.metadata() or {}), list(file.keys())
            if names != [TENSOR]:
                raise KVPolicyError(
                    f"{path} holds {len(names)} tensors ({', '.join(names[:3])}, ...), not just {TENSOR!r}; it is not "
                    "a steering vector"
                )
            return file.get_tensor(TENSOR), metadata
    except (OSError, SafetensorError) as error:
        raise KVPolicyError(
            f"{path} is not a safetensors file ({error}); `skipkv import-vector` reads .pt and .gguf"
        ) from None


def _is_close(written: str | None, norm: float) -> bool:
    try:
        return math.isclose(float(written or "nan"), norm, rel_tol=NORM_TOLERANCE)
    except ValueError:
        return False


def describe(tensor: Tensor) -> str:
    """Return dtype and shape for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the digest needs."""

    def get_vocab(self) -> dict[str, int]: ...


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return 16 hexadecimal digits that change with the text or id of any token."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
