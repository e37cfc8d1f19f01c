"""Traces: one safetensors file per finished request that says which tokens were held when.

The workers know what was kept, the scheduler knows the text and when a request ends. Each worker leaves a
part per compaction in `<trace-dir>/.parts`; when the request ends the scheduler joins them. With workers on
several machines the folder must be on a file system they share. Nothing of this exists when tracing is off.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import KVPolicyConfig
from .errors import KVPolicyError
from .scheduler.messages import Started
from .scheduler.planner import Compaction
from .sentences import SentenceTables, segment_with

if TYPE_CHECKING:
    from .sentences.tracker import SentenceTracker

WAIT_SECONDS = 30.0


class Trace(NamedTuple):
    """A trace file in memory. n compactions, s sentences, p pairs; positions are logical.

    Attributes:
        prompt_token_ids: int64 `[prompt]`.
        output_token_ids: int64 `[output]`.
        logical_length: int64 `[n]` tokens computed when each compaction took place.
        resident_before: int64 `[n]` tokens held just before it.
        kept: n tensors, int32 `[layers, kv_heads, resident_after]`, ascending positions of the survivors.
        life: int64 `[n]` how often the request had been preempted before it.
        sentences: int64 `[s, 2]` start and end (exclusive) of each closed sentence.
        similar_pairs: int64 `[p, 2]` rows of `sentences`: the earlier and the later that repeats it.
        similarity: float32 `[p]` their cosine.
        parameters: the run's configuration.
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
        """Write the file in one piece, so that nobody reads half of it."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        tensors |= {f"kept/{i}": kept for i, kept in enumerate(self.kept)}
        _save(tensors, path, {"parameters": json.dumps(self.parameters)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file."""
        with safe_open(str(path), "pt") as file:
            names = set(file.keys())
            fields = {name: file.get_tensor(name) for name in names if not name.startswith("kept/")}
            kept = [file.get_tensor(f"kept/{i}") for i in range(len(names) - len(fields))]
            return cls(kept=kept, parameters=json.loads(file.metadata()["parameters"]), **fields)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(unfinished), metadata)
    unfinished.rename(path)


def _file_name(request_id: str) -> str:
    """A file name that no other request id has, and that is never "." or ".."."""
    return quote(request_id, safe="").replace(".", "%2E")


def _part(folder: Path, request_id: str, life: int, index: int, rank: int) -> Path:
    return folder / ".parts" / _file_name(request_id) / f"{life}.{index}.rank{rank}.safetensors"


class TraceWriter:
    """Worker side: leaves a part for each compaction. It waits for the device, as tracing must."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._lives: dict[str, int] = {}

    def started(self, request_id: str) -> None:
        """A request starts or starts over."""
        self._lives[request_id] = self._lives.get(request_id, -1) + 1

    def finished(self, request_ids: Iterable[str]) -> None:
        """These requests are gone for good."""
        for request_id in request_ids:
            self._lives.pop(request_id, None)

    def compacted(self, order: Compaction, kept: Tensor, tracker: SentenceTracker | None, slot: int) -> None:
        """Record a compaction; `kept` is `[layers, heads, num_keep]`, ascending positions."""
        tensors = {"kept": kept.to(torch.int32)}
        if tracker is not None and tracker.has_embeddings:
            tensors["similar_pairs"], tensors["similarity"] = tracker.similar_pairs(slot)
        path = _part(self._folder, order.request_id, self._lives[order.request_id], order.ordinal, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(tensors, path)


class _Log:
    """What the scheduler remembers of a running request."""

    def __init__(self) -> None:
        self.life = -1
        self.first_tracked = 0
        self.orders: list[tuple[int, Compaction]] = []
        self.policy = "full"


class TraceCollector:
    """Scheduler side: joins the parts of a request when it ends.

    Args:
        config: the server's policy; `kv_trace_dir` must be set.
        grid: stages of the pipeline, and workers whose kv heads make up a layer; a worker's rank counts in this order.
        tables: the tokenizer's sentence tables, or None without a tokenizer.
        parameters: written into every file.

    Raises:
        KVPolicyError: the folder cannot be created or written.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        grid: tuple[int, int],
        tables: SentenceTables | None,
        parameters: dict[str, Any],
    ) -> None:
        assert config.kv_trace_dir is not None
        self._folder = Path(config.kv_trace_dir)
        try:
            (self._folder / ".parts").mkdir(parents=True, exist_ok=True)
            (self._folder / ".parts" / ".writable").touch()
        except OSError as error:
            raise KVPolicyError(
                f"kv_trace_dir={config.kv_trace_dir!r} cannot be written ({error.strerror}); name a folder that can"
            ) from None
        self._num_stages, self._width = grid
        self._tables = tables
        self._parameters = parameters
        self._logs: dict[str, _Log] = {}

    def started(self, started: Started) -> None:
        """A managed request starts or starts over."""
        log = self._logs.setdefault(started.request_id, _Log())
        log.life += 1
        log.first_tracked = started.first_tracked
        log.policy = started.policy

    def compacted(self, order: Compaction) -> None:
        """An order was sent to the workers."""
        log = self._logs[order.request_id]
        log.orders.append((log.life, order))

    def finish(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        steering: dict[str, Any] | None = None,
    ) -> Path:
        """Write the trace of a request that ended, with what its steering came to, if any; returns its path.

        Raises:
            TimeoutError: a worker did not deliver its part.
        """
        log = self._logs.pop(request_id, _Log())
        parts = [self._read_parts(request_id, life, order.ordinal) for life, order in log.orders]
        pairs: dict[tuple[int, int], float] = {}
        for part in parts:
            if "similar_pairs" in part:
                rows = zip(part["similar_pairs"].tolist(), part["similarity"].tolist(), strict=True)
                pairs |= {(earlier, later): cosine for (earlier, later), cosine in rows}
        text = [*prompt_token_ids, *output_token_ids]
        found = segment_with(text[log.first_tracked :], self._tables) if self._tables else []
        path = self._folder / f"{_file_name(request_id)}.safetensors"
        orders = [order for _, order in log.orders]
        Trace(
            prompt_token_ids=torch.tensor(prompt_token_ids, dtype=torch.int64),
            output_token_ids=torch.tensor(output_token_ids, dtype=torch.int64),
            logical_length=torch.tensor([o.num_logical for o in orders], dtype=torch.int64),
            resident_before=torch.tensor([o.num_resident for o in orders], dtype=torch.int64),
            kept=[part["kept"] for part in parts],
            life=torch.tensor([life for life, _ in log.orders], dtype=torch.int64),
            sentences=torch.tensor(
                [[s.start + log.first_tracked, s.end + log.first_tracked] for s in found], dtype=torch.int64
            ).view(-1, 2),
            similar_pairs=torch.tensor(list(pairs), dtype=torch.int64).view(-1, 2),
            similarity=torch.tensor(list(pairs.values()), dtype=torch.float32),
            parameters=self._parameters
            | {"request_id": request_id, "request_policy": log.policy, "request_steering": steering},
        ).save(path)
        shutil.rmtree(self._folder / ".parts" / _file_name(request_id), ignore_errors=True)
        return path

    def _read_parts(self, request_id: str, life: int, index: int) -> dict[str, Tensor]:
        """One compaction's parts of all ranks, layers and kv heads joined."""
        parts = []
        for rank in range(self._num_stages * self._width):
            path = _part(self._folder, request_id, life, index, rank)
            deadline = time.monotonic() + WAIT_SECONDS
            # The last order may still be on its way when the scheduler runs ahead of the workers.
            while not path.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no trace part {path} after {WAIT_SECONDS:.0f} s")
                time.sleep(0.005)
            with safe_open(str(path), "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        kept = [part["kept"] for part in parts]
        stages = [torch.cat(kept[i : i + self._width], dim=1) for i in range(0, len(kept), self._width)]
        # Of a pipeline's stages the last one knows the sentences; its ranks know the same.
        return parts[-1] | {"kept": torch.cat(stages, dim=0)}
