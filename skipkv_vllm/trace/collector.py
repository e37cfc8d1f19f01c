"""The scheduler's side of traces: it joins the parts of a request when the request ends."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.auxiliary import BackgroundJobs, auxiliary, report_failure
from ..core.errors import KVPolicyError
from ..core.orders import Compaction, Started, Swap
from ..sentences import SentenceTables, split_sentences
from .files import FLUSH_SECONDS, TOO_MANY, Trace, part_path, parts_folder, trace_path

WAIT_SECONDS = 30.0
"""time after the end of a request until its trace is dropped because a part is missing"""
SETTLE_SECONDS = 0.25
"""time that an idle engine waits for its last traces"""
MAX_TRACES_WAITING = 256
STALE_SECONDS = 24 * 3600.0
"""age at which parts are removed as those of a killed server"""

DROP_REASONS = ("backlog", "missing_part", "not_written")
"""Reasons for which a trace is dropped: too many wait for the storage, a part is missing, or writing failed."""


def _remove_stale(parts: Path) -> None:
    """Remove the parts of servers that were killed while they traced requests."""
    oldest = time.time() - STALE_SECONDS
    for folder in parts.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


class _Sent(NamedTuple):
    """An order whose parts are awaited: the life of its request, its number in this life, and the order."""

    life: int
    number: int
    order: Compaction | Swap


class _Log:
    """Orders of a running request."""

    def __init__(self) -> None:
        self.life = -1
        self.first_tracked = 0
        self.num_orders = 0
        """in this life"""
        self.orders: list[_Sent] = []
        self.policy = "full"


class _Ended(NamedTuple):
    """A finished request; its parts are awaited until `time.monotonic()` reaches `deadline`."""

    request_id: str
    log: _Log
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    steering: dict[str, Any] | None
    deadline: float


class MissingPartError(Exception):
    """A part of a trace is missing."""


class TraceCollector:
    """Join the parts of finished requests in a thread.

    Args:
        folder: `--kv-trace-dir`.
        grid: number of pipeline stages, and of workers that share the kv heads of a layer; ranks are numbered in this
            order.
        tables: sentence tables of the tokenizer, or None without a tokenizer.
        parameters: written into every file.

    Raises:
        KVPolicyError: the folder cannot be created or written.
    """

    def __init__(
        self,
        folder: str,
        grid: tuple[int, int],
        tables: SentenceTables | None,
        parameters: dict[str, Any],
    ) -> None:
        self._folder = Path(folder)
        try:
            (self._folder / ".parts").mkdir(parents=True, exist_ok=True)
            (self._folder / ".parts" / ".writable").touch()
        except OSError as error:
            raise KVPolicyError(
                f"kv_trace_dir={folder!r} cannot be written ({error.strerror}); name a writable folder"
            ) from None
        self._num_stages, self._width = grid
        self._tables = tables
        self._parameters = parameters
        self._logs: dict[str, _Log] = {}
        self._jobs = BackgroundJobs("write a trace", MAX_TRACES_WAITING)
        _remove_stale(self._folder / ".parts")
        self._dropped: deque[str] = deque()
        """reasons, filled by the thread that writes"""
        self._is_slow = False
        self._abandoned: deque[str] = deque(maxlen=1000)
        """requests whose trace was dropped; late parts may still arrive"""

    def sent(self, orders: Iterable[Compaction | Swap], started: Iterable[Started]) -> None:
        """Record the orders of a step: first compactions and swaps, then the requests that start or start over."""
        with auxiliary("write a trace"):
            for order in orders:
                log = self._logs[order.request_id]
                log.orders.append(_Sent(log.life, log.num_orders, order))
                log.num_orders += 1
            for start in started:
                log = self._logs.setdefault(start.request_id, _Log())
                log.life += 1
                log.num_orders = 0
                log.first_tracked = start.first_tracked
                log.policy = start.policy

    def finish(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        steering: dict[str, Any] | None = None,
    ) -> None:
        """Queue the trace of a finished request for writing.

        Args:
            request_id: the request.
            prompt_token_ids: its prompt.
            output_token_ids: its output.
            steering: results of its steering, if any.
        """
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
        """Wait for the traces of all finished requests; False if that takes longer than `timeout` seconds."""
        return self._jobs.flush(timeout)

    def close(self) -> None:
        """Finish pending traces within the default time, and remove the parts that remain."""
        self.flush()
        for request_id in (*self._logs, *self._abandoned):
            self._clean(request_id)

    def settle(self) -> None:
        """Wait a moment for the traces of all finished requests, unless earlier traces are still being written.

        An idle engine calls this, so that a trace can be read right after the last answer.
        """
        if not self._is_slow:
            self._is_slow = not self._jobs.flush(SETTLE_SECONDS)

    def take_dropped(self) -> Counter[str]:
        """Return how many traces were dropped since the last call, by reason (see `DROP_REASONS`)."""
        return Counter(self._dropped.popleft() for _ in range(len(self._dropped)))

    def _write_or_drop(self, ended: _Ended) -> None:
        try:
            if not self._is_complete(ended):
                # Workers may not have carried out the last order yet.
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
        shutil.rmtree(parts_folder(self._folder, request_id), ignore_errors=True)

    def _is_complete(self, ended: _Ended) -> bool:
        """Return whether all parts exist.

        Raises:
            MissingPartError: a worker could not write its part, or did not in time.
        """
        for life, number, _ in ended.log.orders:
            for path in self._part_paths(ended.request_id, life, number):
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
        return [part_path(self._folder, request_id, life, index, rank) for rank in ranks]

    def _write(self, ended: _Ended) -> None:
        """Join the parts, all of which exist."""
        log = ended.log
        parts = [self._read_parts(ended, life, number) for life, number, _ in log.orders]
        pairs: dict[tuple[int, int], float] = {}
        for part in parts:
            if "similar_pairs" in part:
                rows = zip(part["similar_pairs"].tolist(), part["similarity"].tolist(), strict=True)
                pairs |= {(earlier, later): similarity for (earlier, later), similarity in rows}
        text = [*ended.prompt_token_ids, *ended.output_token_ids]
        found = split_sentences(text[log.first_tracked :], self._tables) if self._tables else []
        orders = [each.order for each in log.orders]
        Trace(
            prompt_token_ids=torch.tensor(ended.prompt_token_ids, dtype=torch.int64),
            output_token_ids=torch.tensor(ended.output_token_ids, dtype=torch.int64),
            logical_length=torch.tensor([o.num_logical for o in orders], dtype=torch.int64),
            resident_before=torch.tensor([o.num_resident for o in orders], dtype=torch.int64),
            kept=[part["kept"] for part in parts],
            life=torch.tensor([each.life for each in log.orders], dtype=torch.int64),
            sentences=torch.tensor(
                [[s.start + log.first_tracked, s.end + log.first_tracked] for s in found], dtype=torch.int64
            ).view(-1, 2),
            similar_pairs=torch.tensor(list(pairs), dtype=torch.int64).view(-1, 2),
            similarity=torch.tensor(list(pairs.values()), dtype=torch.float32),
            parameters=self._parameters
            | {"request_id": ended.request_id, "request_policy": log.policy, "request_steering": ended.steering},
        ).save(trace_path(self._folder, ended.request_id))

    def _read_parts(self, ended: _Ended, life: int, index: int) -> dict[str, Tensor]:
        """Read the parts of a compaction and join the layers and kv heads of all ranks."""
        parts = []
        for path in self._part_paths(ended.request_id, life, index):
            with safe_open(str(path), "pt") as file:
                parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        kept = [part["kept"] for part in parts]
        stages = [torch.cat(kept[i : i + self._width], dim=1) for i in range(0, len(kept), self._width)]
        # Only the last pipeline stage tracks sentences, the same on all its ranks.
        return parts[-1] | {"kept": torch.cat(stages, dim=0)}
