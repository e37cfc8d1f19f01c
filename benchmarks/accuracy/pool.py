"""The worker processes of one batch size."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from . import RunError, worker
from .grid import Settings

LOG_LINES = 15


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    log: Path


class Pool:
    """The workers of one batch size; `start` comes before `answers`."""

    def __init__(self, settings: Settings, batch_size: int, processes: int, cores: list[int], out: Path) -> None:
        self.settings, self.batch_size, self.out = settings, batch_size, out
        # Neighbouring cores share a NUMA node, so shares are contiguous.
        ends = [round(i * len(cores) / processes) for i in range(processes + 1)]
        self.cores = [cores[ends[i] : ends[i + 1]] if processes > 1 else [] for i in range(processes)]
        self.kv_bytes_per_token = 0
        self._workers: list[_Worker] = []

    def answers(self, shares: list[list[worker.Request]]) -> Iterator[worker.Answer]:
        """Answers of all shares as they finish; share i goes to worker i.

        Raises:
            RunError: a worker failed or died.
        """
        busy: dict[Any, _Worker] = {}
        for each, share in zip(self._workers, shares, strict=True):
            if share:
                each.connection.send(share)
                busy[each.connection] = each
        while busy:
            for connection in wait(list(busy)):
                message = self._receive(busy[connection])
                if isinstance(message, worker.Finished):
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
        context = multiprocessing.get_context("spawn")
        for number, cores in enumerate(self.cores):
            here, there = context.Pipe()
            log = self.out / f"worker-{self.batch_size}-{number}.log"
            arguments = (there, self.settings, self.batch_size, cores, log)
            process = context.Process(target=worker.work, args=arguments)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._workers.append(_Worker(process, here, log))
        for each in self._workers:
            self.kv_bytes_per_token = self._receive(each).kv_bytes_per_token

    def _receive(self, each: _Worker) -> Any:
        try:
            message = each.connection.recv()
        except EOFError:
            tail = "\n".join(each.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RunError(f"an engine died; full log: {each.log}\n{tail}") from None
        if isinstance(message, worker.Failed):
            last = message.text.strip().splitlines()[-1]
            raise RunError(f"an engine failed: {last}\nfull log: {each.log}\n{message.text}")
        return message

    def stop(self, patience: float) -> None:
        """End all workers.

        Args:
            patience: seconds to wait for those that finish by themselves; then by force.
        """
        for each in self._workers:
            try:
                each.connection.send(None)
            except OSError:
                continue
        deadline = time.monotonic() + patience
        for each in self._workers:
            each.process.join(max(0.1, deadline - time.monotonic()))
            for end in (each.process.terminate, each.process.kill):
                if each.process.is_alive():
                    end()
                    each.process.join(10)
