"""A child process that answers messages; when it ends, all its memory is released."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import RunError

LOG_LINES = 15


@dataclass(frozen=True)
class Finished:
    """All jobs sent so far are answered."""


@dataclass(frozen=True)
class Failed:
    """The child failed; the text is a traceback."""

    text: str


class Child:
    """A process and this end of the pipe to it.

    Args:
        body: runs in the child; takes its end of the pipe, then `arguments`.
        arguments: pickled for the child.
        log: file that the child's output is appended to; `body` redirects it with `attended`.
    """

    def __init__(self, body: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.log = log
        self._process = context.Process(target=body, args=(there, *arguments))
        self._process.start()
        there.close()  # the pipe then closes when the process ends

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            RunError: the child failed or died.
        """
        try:
            message = self.connection.recv()
        except EOFError:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RunError(f"an engine died; full log: {self.log}\n{tail}") from None
        if isinstance(message, Failed):
            last = message.text.strip().splitlines()[-1]
            raise RunError(f"an engine failed: {last}\nfull log: {self.log}\n{message.text}")
        return message

    def ask_to_end(self) -> None:
        """Send None, which ends the child's loop."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self, patience: float) -> None:
        """Wait for the end of the process.

        Args:
            patience: seconds; after them the process is killed.
        """
        self._process.join(max(0.1, patience))
        for force in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                force()
                self._process.join(10)


@contextlib.contextmanager
def attended(connection: Connection, log: Path) -> Iterator[None]:
    """Run a child's body with its output in the log and its errors sent to the parent.

    Args:
        connection: the child's end of the pipe.
        log: file to append to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        yield
    except EOFError:  # the parent is gone
        return
    except Exception:
        connection.send(Failed(traceback.format_exc()))
