"""Trace files: one safetensors file per finished request, and the parts that workers write for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FLUSH_SECONDS = 5.0
"""default time that `flush` waits for the storage"""
TOO_MANY = "too many writes are waiting, or no thread could be started"
LONGEST_NAME = 128
"""most characters of a request's file name; file systems allow 143 to 255 bytes, prefixes and suffixes included"""


class Trace(NamedTuple):
    """A trace file in memory. n compactions, s sentences, p pairs; positions are logical.

    Attributes:
        prompt_token_ids: int64 `[prompt]`.
        output_token_ids: int64 `[output]`.
        logical_length: int64 `[n]` tokens computed when each compaction took place.
        resident_before: int64 `[n]` tokens held just before it.
        kept: n tensors, int32 `[layers, kv_heads, resident_after]`, ascending positions of the survivors.
        life: int64 `[n]` number of preemptions of the request before each compaction.
        sentences: int64 `[s, 2]` start and end (exclusive) of each closed sentence.
        similar_pairs: int64 `[p, 2]` rows of `sentences`: the earlier sentence and the later one that repeats it.
        similarity: float32 `[p]` their cosine, or the share of the earlier sentence that the later one repeats.
        parameters: configuration of the run.
    """

    prompt_token_ids: Tensor
    output_token_ids: Tensor
    logical_length: Tensor
    resident_before: Tensor
    kept: list[Tensor]
    life: Tensor
    sentences: Tensor
    similar_pairs: Tensor
    similarity: Tensor
    parameters: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        tensors |= {f"kept/{i}": kept for i, kept in enumerate(self.kept)}
        save_tensors(tensors, path, {"parameters": json.dumps(self.parameters)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file."""
        with safe_open(str(path), "pt") as file:
            names = set(file.keys())
            fields = {name: file.get_tensor(name) for name in names if not name.startswith("kept/")}
            kept = [file.get_tensor(f"kept/{i}") for i in range(len(names) - len(fields))]
            return cls(kept=kept, parameters=json.loads(file.metadata()["parameters"]), **fields)


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host; waits for the device."""
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    # The folder may have been removed since the server started.
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(on_host(tensors), str(unfinished), metadata)
        unfinished.rename(path)
    except BaseException:
        # On a full disk, an unfinished file would take the space of the next one.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _file_name(request_id: str) -> str:
    """Return a file name of bounded length that is unique to a request id and never "." or ".."."""
    # The JSON of a client may contain half a surrogate pair.
    content = request_id.encode("utf-8", "surrogatepass")
    name = quote(content, safe="").replace(".", "%2E")
    if len(name) <= LONGEST_NAME:
        return name or "%"
    digest = hashlib.sha256(content).hexdigest()[:32]
    # No quoted id contains "+".
    return f"{name[: LONGEST_NAME - len(digest) - 1]}+{digest}"


def trace_path(folder: str | Path, request_id: str) -> Path:
    """Return the file of a request's trace; its `parameters` hold the whole request id."""
    return Path(folder, f"{_file_name(request_id)}.safetensors")


def parts_folder(folder: Path, request_id: str) -> Path:
    """Return the folder of a running request's parts."""
    return folder / ".parts" / _file_name(request_id)


def part_path(folder: Path, request_id: str, life: int, index: int, rank: int) -> Path:
    """Return the file of one worker's part of a compaction."""
    return parts_folder(folder, request_id) / f"{life}.{index}.rank{rank}.safetensors"
