"""Traces: one safetensors file per finished request that says which tokens were held when.

The workers know what was kept, the scheduler knows the text and when a request ends. Each worker leaves a
part per compaction in `<trace-dir>/.parts`; when the request ends the scheduler joins them. With workers on
several machines the folder must be on a file system they share. Nothing of this exists when tracing is off.

All files are read and written by a thread of each process. A trace that cannot be written is dropped, logged and
counted. Nobody waits for the storage but an engine that has nothing else to do, for a quarter of a second.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .auxiliary import BackgroundJobs, auxiliary, report_failure
from .config import KVPolicyConfig
from .errors import KVPolicyError
from .scheduler.messages import Started
from .scheduler.planner import Compaction
from .sentences import SentenceTables, segment_with

if TYPE_CHECKING:
    from .sentences.tracker import SentenceTracker

WAIT_SECONDS = 30.0
"""from a request's end until its trace is dropped because a worker's part is missing"""
FLUSH_SECONDS = 5.0
SETTLE_SECONDS = 0.25
"""for which an engine without requests waits for its last traces"""
MAX_PARTS_WAITING = 64
MAX_TRACES_WAITING = 256
STALE_SECONDS = 24 * 3600.0
"""after which parts are nobody's any more: their server was killed"""
LONGEST_NAME = 128
"""characters of a request's file name; file systems allow 143 to 255 bytes, prefixes and suffixes included"""

TOO_MANY = "too many wait already, or no thread can be started"
DROP_REASONS = ("backlog", "missing_part", "not_written")
"""Why a trace was dropped: too many were waiting for the storage, a worker did not deliver, or writing it failed."""


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
        similarity: float32 `[p]` their cosine, or which share of the earlier one the later says again.
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


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    # The folder may have been removed since the server started.
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(_on_host(tensors), str(unfinished), metadata)
        unfinished.rename(path)
    except BaseException:
        # On a full disk the rest of an unfinished file would take the space of the next one.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _file_name(request_id: str) -> str:
    """A file name of bounded length that no other request id has, and that is never "." or ".."."""
    # A client may send half a surrogate pair in its JSON.
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


def _parts(folder: Path, request_id: str) -> Path:
    return folder / ".parts" / _file_name(request_id)


def _part(folder: Path, request_id: str, life: int, index: int, rank: int) -> Path:
    return _parts(folder, request_id) / f"{life}.{index}.rank{rank}.safetensors"


class TraceWriter:
    """Worker side: leaves a part for each compaction. It waits for the device, as tracing must, never for storage."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._lives: dict[str, int] = {}
        self._jobs = BackgroundJobs("write a trace part", MAX_PARTS_WAITING)

    def started(self, request_id: str) -> None:
        """A request starts or starts over."""
        self._lives[request_id] = self._lives.get(request_id, -1) + 1

    def finished(self, request_ids: Iterable[str]) -> None:
        """These requests are gone for good."""
        for request_id in request_ids:
            self._lives.pop(request_id, None)

    def compacted(self, order: Compaction, kept: Tensor, tracker: SentenceTracker | None, slot: int) -> None:
        """Record a compaction; `kept` is `[layers, heads, num_keep]`, ascending positions."""
        with auxiliary("write a trace part"):
            tensors = {"kept": kept.to(torch.int32)}
            if tracker is not None and tracker.compares:
                tensors["similar_pairs"], tensors["similarity"] = tracker.similar_pairs(slot)
            path = _part(self._folder, order.request_id, self._lives[order.request_id], order.ordinal, self._rank)
            job, instead = functools.partial(_write_part, _on_host(tensors), path), functools.partial(_lose, path)
            if not self._jobs.submit(job, instead):
                report_failure("write a trace part", TOO_MANY)

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait for the parts to be written; False if that takes longer than `timeout` seconds."""
        return self._jobs.flush(timeout)


def _write_part(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        _save(tensors, path)
    except Exception:
        _lose(path)
        raise


def _lose(path: Path) -> None:
    """Tell the scheduler not to wait for a part, if as little as that can be written."""
    # Where the folder is gone the trace was dropped already.
    with contextlib.suppress(OSError):
        path.with_suffix(".lost").touch()


def _remove_stale(parts: Path) -> None:
    """Remove what servers left that were killed while they traced requests."""
    oldest = time.time() - STALE_SECONDS
    for folder in parts.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


class _Log:
    """What the scheduler remembers of a running request."""

    def __init__(self) -> None:
        self.life = -1
        self.first_tracked = 0
        self.orders: list[tuple[int, Compaction]] = []
        self.policy = "full"


class _Ended(NamedTuple):
    """A request whose trace is to be written; `deadline` is the `time.monotonic()` until which parts are awaited."""

    request_id: str
    log: _Log
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    steering: dict[str, Any] | None
    deadline: float


class MissingPartError(Exception):
    """A worker did not deliver its part of a trace."""


class TraceCollector:
    """Scheduler side: joins the parts of a request when it ends, in a thread.

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
        self._jobs = BackgroundJobs("write a trace", MAX_TRACES_WAITING)
        _remove_stale(self._folder / ".parts")
        self._dropped: deque[str] = deque()
        """reasons, from the thread that writes"""
        self._is_slow = False
        self._abandoned: deque[str] = deque(maxlen=1000)
        """requests whose trace was dropped; a late part may still arrive"""

    def sent(self, compactions: Iterable[Compaction], started: Iterable[Started]) -> None:
        """Note a step's orders to the workers: first the compactions, then the requests that start or start over."""
        with auxiliary("write a trace"):
            for order in compactions:
                log = self._logs[order.request_id]
                log.orders.append((log.life, order))
            for start in started:
                log = self._logs.setdefault(start.request_id, _Log())
                log.life += 1
                log.first_tracked = start.first_tracked
                log.policy = start.policy

    def finish(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        steering: dict[str, Any] | None = None,
    ) -> None:
        """Have the trace of a request that ended written soon, with what its steering came to, if any."""
        ended = _Ended(
            request_id,
            self._logs.pop(request_id, _Log()),
            prompt_token_ids,
            output_token_ids,
            steering,
            time.monotonic() + WAIT_SECONDS,
        )
        self._is_slow &= not self._jobs.is_idle
        job, instead = functools.partial(self._write_or_drop, ended), functools.partial(self._clean, request_id)
        if not self._jobs.submit(job, instead):
            self._abandon(request_id, "backlog", TOO_MANY)

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait for the traces of all requests that ended; False if that takes longer than `timeout` seconds."""
        return self._jobs.flush(timeout)

    def close(self) -> None:
        """Finish what can be finished, and remove the parts that nobody will read."""
        self.flush()
        for request_id in (*self._logs, *self._abandoned):
            self._clean(request_id)

    def settle(self) -> None:
        """Wait a moment for the traces of all requests that ended, unless earlier ones took longer and still do.

        For an engine that has nothing else to do, so that a trace can be read right after the last answer.
        """
        if not self._is_slow:
            self._is_slow = not self._jobs.flush(SETTLE_SECONDS)

    def take_dropped(self) -> Counter[str]:
        """Return how many traces were dropped since the last call, by reason (see `DROP_REASONS`)."""
        return Counter(self._dropped.popleft() for _ in range(len(self._dropped)))

    def _write_or_drop(self, ended: _Ended) -> None:
        try:
            if not self._is_complete(ended):
                # The last order may still be on its way when the scheduler runs ahead of the workers.
                time.sleep(0.005)
                self._jobs.again(functools.partial(self._write_or_drop, ended))
                return
            self._write(ended)
        except Exception as error:
            reason = "missing_part" if isinstance(error, MissingPartError) else "not_written"
            self._abandon(ended.request_id, reason, error)
        self._clean(ended.request_id)

    def _abandon(self, request_id: str, reason: str, error: Exception | str) -> None:
        self._dropped.append(reason)
        self._abandoned.append(request_id)
        report_failure("write a trace", error)

    def _clean(self, request_id: str) -> None:
        shutil.rmtree(_parts(self._folder, request_id), ignore_errors=True)

    def _is_complete(self, ended: _Ended) -> bool:
        """Whether all parts are there.

        Raises:
            MissingPartError: a worker could not write its part, or did not in time.
        """
        for life, order in ended.log.orders:
            for path in self._part_paths(ended.request_id, life, order.ordinal):
                if path.exists():
                    continue
                if path.with_suffix(".lost").exists():
                    raise MissingPartError(f"a worker could not write {path}")
                if time.monotonic() > ended.deadline:
                    raise MissingPartError(f"no trace part {path} after {WAIT_SECONDS:.0f} s")
                return False
        return True

    def _part_paths(self, request_id: str, life: int, index: int) -> list[Path]:
        ranks = range(self._num_stages * self._width)
        return [_part(self._folder, request_id, life, index, rank) for rank in ranks]

    def _write(self, ended: _Ended) -> None:
        """Join the parts, which are all there."""
        log = ended.log
        parts = [self._read_parts(ended, life, order.ordinal) for life, order in log.orders]
        pairs: dict[tuple[int, int], float] = {}
        for part in parts:
            if "similar_pairs" in part:
                rows = zip(part["similar_pairs"].tolist(), part["similarity"].tolist(), strict=True)
                pairs |= {(earlier, later): similarity for (earlier, later), similarity in rows}
        text = [*ended.prompt_token_ids, *ended.output_token_ids]
        found = segment_with(text[log.first_tracked :], self._tables) if self._tables else []
        orders = [order for _, order in log.orders]
        Trace(
            prompt_token_ids=torch.tensor(ended.prompt_token_ids, dtype=torch.int64),
            output_token_ids=torch.tensor(ended.output_token_ids, dtype=torch.int64),
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
            | {"request_id": ended.request_id, "request_policy": log.policy, "request_steering": ended.steering},
        ).save(trace_path(self._folder, ended.request_id))

    def _read_parts(self, ended: _Ended, life: int, index: int) -> dict[str, Tensor]:
        """One compaction's parts of all ranks, layers and kv heads joined."""
        parts = []
        for path in self._part_paths(ended.request_id, life, index):
            with safe_open(str(path), "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        kept = [part["kept"] for part in parts]
        stages = [torch.cat(kept[i : i + self._width], dim=1) for i in range(0, len(kept), self._width)]
        # Of a pipeline's stages the last one knows the sentences; its ranks know the same.
        return parts[-1] | {"kept": torch.cat(stages, dim=0)}
