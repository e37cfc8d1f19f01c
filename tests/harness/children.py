"""Child processes that run jobs: with other variables, or on Model Runner V2 in Triton's interpreter."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.harness.process import shutdown
from tests.harness.settings import REPOSITORY

FROM_TESTS = ("OMP_NUM_THREADS", "PYTHONPATH", "TORCHDYNAMO_DISABLE", "VLLM_CPU_OMP_THREADS_BIND")
"""Variables of this process that tests set for children; vLLM changes others whenever an engine starts."""


class Child:
    """A process that runs job files until it is stopped, and keeps its engine from one to the next.

    Args:
        variables: to change in its environment.
        interpreted, triton_attention: see `run_in_child`.
    """

    def __init__(self, variables: Mapping[str, str], interpreted: bool, triton_attention: bool) -> None:
        answers, answer = os.pipe()
        code = f"from tests import harness; harness.work({answer}, {interpreted}, {triton_attention})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=os.environ | dict(variables),
            stdin=subprocess.PIPE,
            pass_fds=[answer],
        )
        os.close(answer)
        self._answers = open(answers, "rb", buffering=0)  # noqa: SIM115
        atexit.register(self.stop)

    def run(self, path: Path) -> None:
        """Run the jobs in a file.

        Raises:
            subprocess.CalledProcessError: the process ended; its traceback is on stderr.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n".encode())
        self._process.stdin.flush()
        if not self._answers.read(1):
            raise subprocess.CalledProcessError(self._process.wait(), self._process.args)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process after its job."""
        atexit.unregister(self.stop)
        self._process.communicate()
        self._answers.close()


_kept: tuple[tuple, Child] | None = None


def run_file(path: Path, variables: Mapping[str, str], interpreted: bool, triton_attention: bool) -> None:
    """Run the jobs in a file in a child; an interpreting one, which takes long to start, stays for the next file."""
    global _kept
    key = (variables, interpreted, triton_attention, [os.environ.get(name) for name in FROM_TESTS])
    if _kept is None or _kept[0] != key or not _kept[1].is_alive():
        stop()
        _kept = (key, Child(variables, interpreted, triton_attention))
    try:
        _kept[1].run(path)
    finally:
        if not interpreted:  # the next engine may need its GPU
            stop()


def stop() -> None:
    """Stop the child that was kept, if any."""
    global _kept
    if _kept is not None:
        (_, child), _kept = _kept, None
        child.stop()


def serve(answer: int, run: Callable[[Path], None]) -> None:
    """Run the files whose paths are read from stdin, and acknowledge each."""
    for line in sys.stdin:
        run(Path(line.rstrip("\n")))
        os.write(answer, b"\n")
    shutdown()
