"""Fake workers for runs of the accuracy harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy import worker
from benchmarks.accuracy.grid import Arm, Settings
from benchmarks.accuracy.samples import Sample
from benchmarks.tiny_reasoner.problems import problems

SETTINGS = Settings(
    model="no-such-model",
    data="tiny",
    policies=("full", "skipkv"),
    budgets=("25%", "300"),
    batch_sizes=(4, 1),
    problems=6,
    problems_at={1: 2},
)
ANSWERS = {f"dev-{i}": problem.answer for i, problem in enumerate(problems("dev", 6))}


def sample(**changes: Any) -> Sample:
    values = {
        "policy": "skipkv",
        "budget": 100,
        "batch_size": 4,
        "problem": "dev-0",
        "number": 0,
        "prompt_tokens": 60,
        "completion_tokens": 500,
        "finish_reason": "stop",
        "compactions": 3,
        "evicted_tokens": 300,
        "tokens_digest": "d",
        "answer": "1",
        "correct": True,
        "text": "x",
    }
    return Sample(**values | changes)


class FakePool:
    """Answers everything at once; class attributes define the answers and record the requests."""

    asked: list[worker.Request] = []
    stop_after = 10**9
    compactions = 2
    wrong: set[Arm] = set()
    steered = 7

    def __init__(self, settings: Settings, batch_size: int, processes: int, cores: list[int], out: Path) -> None:
        self.kv_bytes_per_token = 2048

    def answers(self, shares):
        for request in (request for share in shares for request in share):
            if len(FakePool.asked) >= FakePool.stop_after:
                raise KeyboardInterrupt
            FakePool.asked.append(request)
            right = ANSWERS[request.problem] + (request.arm in FakePool.wrong)
            yield worker.Answer(
                request,
                prompt_tokens=60,
                completion_tokens=1000,
                finish_reason="stop",
                compactions=0 if request.arm.policy == "full" else FakePool.compactions,
                evicted_tokens=0,
                tokens_digest=f"{request.problem}",
                text=f"</think>\\boxed{{{right}}}",
                thoughts={"steered_tokens": FakePool.steered, "execution": 5, "reflection": 2, "transition": 1}
                if request.arm.steering
                else {},
            )

    def start(self) -> None:
        pass

    def stop(self, patience: float) -> None:
        pass
