"""An engine in a process of its own that answers orders one after the other, so that several engines can take turns."""

from __future__ import annotations

import gc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.children import Child

PATIENCE = 20.0
"""Seconds that an engine may take to end by itself."""


class Remote:
    """This end of an engine's process.

    Args:
        body: runs in the process; takes its end of the pipe, `arguments` and the log, and calls `answer_orders`.
        arguments: pickled for the process.
        log: file for what the engine prints; an older one is replaced.

    Raises:
        RunError: the engine could not start.
    """

    def __init__(self, body: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        log.unlink(missing_ok=True)
        self._child = Child(body, (*arguments, log), log)
        try:
            self._child.receive()
        except BaseException:
            self._child.end(patience=0)
            raise

    def ask(self, order: Any) -> Any:
        """Send an order and wait for its answer.

        Raises:
            RunError: the engine failed.
        """
        self._child.connection.send(order)
        return self._child.receive()

    def stop(self) -> None:
        """End the process."""
        self._child.ask_to_end()
        self._child.end(PATIENCE)


def answer_orders(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """Say that the engine is ready, then answer orders until None comes."""
    # The objects of the start stay; collecting them again and again would cost time in the steps that are measured.
    gc.collect()
    gc.freeze()
    connection.send(None)
    while (order := connection.recv()) is not None:
        connection.send(answer(order))
