"""Auxiliary output (metrics, traces, reports) must never stop a server."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

logger = logging.getLogger("vllm.skipkv")

LOG_EVERY_SECONDS = 60.0
_reported: dict[str, tuple[float, int]] = {}
"""kind of output -> time of the last logged failure, and number of failures since"""


def report_failure(what: str, error: object) -> None:
    """Log a failure, at most one line a minute for each kind of output.

    Args:
        what: what failed, e.g. "write a trace".
        error: what went wrong.
    """
    last, unreported = _reported.get(what, (float("-inf"), 0))
    now = time.monotonic()
    if now - last < LOG_EVERY_SECONDS:
        _reported[what] = last, unreported + 1
        return
    _reported[what] = now, 0
    more = f" ({unreported} more since the last such line)" if unreported else ""
    cause = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    logger.error("SkipKV: could not %s; serving continues: %s%s", what, cause, more)


@contextlib.contextmanager
def auxiliary(what: str) -> Iterator[None]:
    """Run a block and log its failure instead of raising it; see `report_failure`."""
    try:
        yield
    except Exception as error:
        report_failure(what, error)


class BackgroundJobs:
    """Run jobs in order in one thread, so that slow or hung storage never delays the caller.

    The thread is a daemon and starts with the first job. An exception of a job is logged.

    Args:
        what: what the jobs do, for the log; see `report_failure`.
        max_waiting: most jobs that may wait at once.
    """

    def __init__(self, what: str, max_waiting: int) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._instead: deque[Callable[[], None]] = deque(maxlen=10_000)
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None], instead: Callable[[], None]) -> bool:
        """Queue a job.

        Args:
            job: what to run.
            instead: a cheap fallback that runs after a later job if this one is rejected.

        Returns:
            False if too many jobs wait, or if no thread can be started.
        """
        if self._jobs.qsize() >= self._max_waiting or not self._is_running():
            self._instead.append(instead)
            return False
        self._jobs.put(job)
        return True

    def again(self, job: Callable[[], None]) -> None:
        """Queue a job behind the others; for a job that cannot finish yet."""
        self._jobs.put(job)

    @property
    def is_idle(self) -> bool:
        """Whether every job submitted so far has run."""
        return not self._jobs.unfinished_tasks

    def flush(self, timeout: float) -> bool:
        """Wait until all jobs have run; False if that takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.is_idle:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _is_running(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=f"skipkv: {self._what}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The system allows no more threads.
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            with auxiliary(self._what):
                job()
            # Release its memory before the next job comes.
            del job
            while self._instead:
                with auxiliary(self._what):
                    self._instead.popleft()()
            self._jobs.task_done()
