"""The worker processes of one batch size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.children import Child, Finished

from . import worker
from .grid import Settings


class Pool:
    """The workers of one batch size; `start` comes before `answers`."""

    def __init__(self, settings: Settings, batch_size: int, processes: int, cores: list[int], out: Path) -> None:
        self.settings, self.batch_size, self.out = settings, batch_size, out
        # Neighbouring cores share a NUMA node, so shares are contiguous.
        ends = [round(i * len(cores) / processes) for i in range(processes + 1)]
        self.cores = [cores[ends[i] : ends[i + 1]] if processes > 1 else [] for i in range(processes)]
        self.kv_bytes_per_token = 0
        self._workers: list[Child] = []

    def answers(self, shares: list[list[worker.Request]]) -> Iterator[worker.Answer]:
        """Answers of all shares as they finish; share i goes to worker i.

        Raises:
            RunError: a worker failed or died.
        """
        busy: dict[Any, Child] = {}
        for each, share in zip(self._workers, shares, strict=True):
            if share:
                each.connection.send(share)
                busy[each.connection] = each
        while busy:
            for connection in wait(list(busy)):
                message = busy[connection].receive()
                if isinstance(message, Finished):
                    del busy[connection]
                else:
                    yield message

    def start(self) -> None:
        """Start the workers, if they are not there yet, and wait until their engines are ready.

        Raises:
            RunError: an engine could not start.
        """
        if self._workers:
            return
        for number, cores in enumerate(self.cores):
            log = self.out / f"worker-{self.batch_size}-{number}.log"
            self._workers.append(Child(worker.work, (self.settings, self.batch_size, cores, log), log))
        for each in self._workers:
            self.kv_bytes_per_token = each.receive().kv_bytes_per_token

    def stop(self, patience: float) -> None:
        """End all workers.

        Args:
            patience: seconds to wait for those that finish by themselves; then by force.
        """
        for each in self._workers:
            each.ask_to_end()
        deadline = time.monotonic() + patience
        for each in self._workers:
            each.end(deadline - time.monotonic())
