"""The generated answers, one JSON line per sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from . import UsageError
from .grid import Arm


@dataclass(frozen=True)
class Sample:
    """One generated answer.

    Attributes:
        policy, budget, batch_size: its arm; the budget in tokens, 0 for `full`.
        problem: id of the task.
        number: of the sample, from 0.
        prompt_tokens, completion_tokens: token counts.
        finish_reason: "stop", or "length" for an answer that was cut off.
        compactions, evicted_tokens: what the engine reports for this request.
        tokens_digest: of the generated token ids; equal where they are.
        answer: as found by the grader; None where there is none.
        correct: whether it is right.
        text: what was generated.
        steering: how it was steered, see `grid.Steer`; "" for not at all.
        steered_tokens: tokens that a vector was added to.
        execution, reflection, transition: sentences by kind, counted in steered answers only.
    """

    policy: str
    budget: int
    batch_size: int
    problem: str
    number: int
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    compactions: int
    evicted_tokens: int
    tokens_digest: str
    answer: str | None
    correct: bool
    text: str
    steering: str = ""
    steered_tokens: int = 0
    execution: int = 0
    reflection: int = 0
    transition: int = 0

    @property
    def arm(self) -> Arm:
        """Its cell of the grid."""
        return Arm(self.policy, self.budget, self.batch_size, self.steering)

    @property
    def key(self) -> tuple[Arm, str, int]:
        """Arm, problem and number; unique within a run."""
        return self.arm, self.problem, self.number

    @property
    def is_truncated(self) -> bool:
        """Whether the answer was cut off at `max_tokens` or at the model's length."""
        return self.finish_reason == "length"


def read_samples(path: Path) -> list[Sample]:
    """Read all whole lines of a results file; [] if there is no file.

    Raises:
        UsageError: a line that is not a sample.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is not a sample ({error}); remove it, or use another --out"
            ) from None
    return samples


class SampleWriter:
    """Appends samples to a file, each at once, so that a stopped run loses at most the answers in progress."""

    def __init__(self, path: Path) -> None:
        # A line that a crash cut off would spoil the next one.
        if path.exists():
            text = path.read_bytes()
            with path.open("rb+") as file:
                file.truncate(text.rfind(b"\n") + 1)
        self._file: IO[str] = path.open("a")

    def write(self, samples: Iterable[Sample]) -> None:
        """Append samples and hand them to the operating system."""
        for sample in samples:
            self._file.write(json.dumps(asdict(sample)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
