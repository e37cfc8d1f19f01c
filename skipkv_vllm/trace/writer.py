"""The worker's side of traces: one part per compaction."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..core.auxiliary import BackgroundJobs, auxiliary, report_failure
from ..core.orders import Compaction, Swap
from .files import FLUSH_SECONDS, TOO_MANY, on_host, part_path, save_tensors

MAX_PARTS_WAITING = 64


class TraceWriter:
    """Write a part for each compaction. Tracing waits for the device, but never for storage.

    Args:
        folder: the trace folder.
        rank: rank of this worker.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._lives: dict[str, tuple[int, int]] = {}
        """number of each request's life, and of its next part"""
        self._jobs = BackgroundJobs("write a trace part", MAX_PARTS_WAITING)

    def started(self, request_id: str) -> None:
        """Record that a request starts or starts over."""
        life, _ = self._lives.get(request_id, (-1, 0))
        self._lives[request_id] = life + 1, 0

    def finished(self, request_ids: Iterable[str]) -> None:
        """Forget finished requests."""
        for request_id in request_ids:
            self._lives.pop(request_id, None)

    def swapped(self, order: Swap, held: Tensor) -> None:
        """Record a swap; `held`: `[layers, heads, held]`, ascending positions of the tokens held after it."""
        self._write(order, {"kept": held})

    def compacted(self, order: Compaction, kept: Tensor, similar: tuple[Tensor, Tensor] | None) -> None:
        """Record a compaction.

        Args:
            order: the order that was carried out.
            kept: `[layers, heads, num_keep]`, ascending positions of the survivors.
            similar: `similar_pairs` and `similarity` of `Trace` so far; None if this worker compares no sentences.
        """
        tensors = {"kept": kept}
        if similar is not None:
            tensors["similar_pairs"], tensors["similarity"] = similar
        self._write(order, tensors)

    def _write(self, order: Compaction | Swap, tensors: dict[str, Tensor]) -> None:
        with auxiliary("write a trace part"):
            tensors["kept"] = tensors["kept"].to(torch.int32)
            life, number = self._lives[order.request_id]
            self._lives[order.request_id] = life, number + 1
            path = part_path(self._folder, order.request_id, life, number, self._rank)
            job, instead = functools.partial(_write_part, on_host(tensors), path), functools.partial(_lose, path)
            if not self._jobs.submit(job, instead):
                report_failure("write a trace part", TOO_MANY)

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until all parts are written; False if that takes longer than `timeout` seconds."""
        return self._jobs.flush(timeout)


def _write_part(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_tensors(tensors, path)
    except Exception:
        _lose(path)
        raise


def _lose(path: Path) -> None:
    """Mark a part as lost, so that the scheduler does not wait for it."""
    # If the folder is gone, the trace has already been dropped.
    with contextlib.suppress(OSError):
        path.with_suffix(".lost").touch()
