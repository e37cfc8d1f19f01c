"""A discrete-event model of vLLM's scheduler: admission, chunked prefill, decode, pages, compaction, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load.lengths import Offered
from skipkv_vllm.core.limits import Limits

from .steptime import StepLoad


@dataclass(frozen=True)
class Setup:
    """One engine.

    Attributes:
        num_pages: of the pool.
        page_size: tokens of a page.
        max_num_seqs: requests at once.
        max_tokens: tokens of a step.
        limits: what requests may hold, with the protected prompt left out; None for full KV.
        protect_prompt: whether prompts are protected.
        stride: steps that are taken at once while nothing but decoding goes on; 1 is exact.
    """

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_tokens: int
    limits: Limits | None = None
    protect_prompt: bool = True
    stride: int = 1


@dataclass
class Outcome:
    """The result of a simulation.

    Attributes:
        seconds: until the last request ended.
        output_tokens: generated.
        steps: of the engine.
        preemptions: of requests.
        compactions: of requests.
        peak_running: most requests at once.
    """

    seconds: float = 0.0
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    compactions: int = 0
    peak_running: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.output_tokens / self.seconds


class Engine:
    """The state of a simulated engine; arrays are by request number.

    Raises:
        ValueError: a request that could never run.
    """

    def __init__(self, load: Sequence[Offered], setup: Setup) -> None:
        self.setup = setup
        self.prompt, self.output = (np.array(column, dtype=np.int64) for column in zip(*load, strict=True))
        self.logical = np.zeros(len(load), dtype=np.int64)  # tokens computed
        self.resident = np.zeros(len(load), dtype=np.int64)
        self.last = self.prompt + self.output - 1  # the last token is never computed
        self.target = self.prompt.copy()  # tokens that are known: computing them is prefill
        self.keep, self.bound = self._bounds()
        self.waiting = deque(range(len(load)))
        self.running: list[int] = []
        self.free = setup.num_pages
        self.promised = 0
        self.outcome = Outcome()
        most = int(self.pages(np.minimum(self.bound, self.last + 1)).max())
        if most > setup.num_pages:
            raise ValueError(f"a request takes up to {most} pages and the pool has {setup.num_pages}")

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        limits = self.setup.limits
        if limits is None:
            never = np.full_like(self.prompt, np.iinfo(np.int64).max)
            return never, never
        protected = self.prompt if self.setup.protect_prompt else np.zeros_like(self.prompt)
        keep = np.maximum(limits.budget, protected + limits.window)
        return keep, keep + limits.buffer

    def pages(self, tokens: np.ndarray) -> np.ndarray:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.setup.page_size)

    def _need(self, number: int) -> int:
        """Pages that must be there when a request is admitted."""
        most = min(int(self.bound[number]), int(self.last[number]) + 1)
        tokens = int(self.target[number]) if self.setup.limits is None else most
        return -(-tokens // self.setup.page_size)

    def _admit(self) -> None:
        setup = self.setup
        while self.waiting and len(self.running) < setup.max_num_seqs:
            need = self._need(self.waiting[0])
            if need > (self.free if setup.limits is None else setup.num_pages - self.promised):
                return
            number = self.waiting.popleft()
            self.running.append(number)
            self.promised += need if setup.limits is not None else 0
            yielded = self._chunk(number)
            if not yielded:
                return

    def _chunk(self, number: int) -> bool:
        """Give a request the next piece of its prefill; False once the step is full."""
        room = self.setup.max_tokens - self._tokens
        take = min(int(self.target[number] - self.logical[number]), room)
        if self.setup.limits is not None:
            take = min(take, int(self.bound[number] - self.resident[number]))
        before = int(self.pages(self.resident[number]))
        self.resident[number] += take
        self.logical[number] += take
        self.free -= int(self.pages(self.resident[number])) - before
        self._tokens += take
        return self._tokens < self.setup.max_tokens

    def _preempt(self) -> None:
        number = self.running.pop()
        self.free += int(self.pages(self.resident[number]))
        # All its text is computed again, and the last token, whose KV was still to come, with it.
        if self.logical[number] >= self.target[number]:
            self.target[number] = self.logical[number] + 1
        self.logical[number] = self.resident[number] = 0
        self.waiting.appendleft(number)
        self.outcome.preemptions += 1

    def run(self, step_time: Callable[[StepLoad], float]) -> Outcome:
        """Answer the load."""
        while self.waiting or self.running:
            self._step(step_time)
        self.outcome.output_tokens = int(self.output.sum())
        return self.outcome

    def _step(self, step_time: Callable[[StepLoad], float]) -> None:
        outcome, setup = self.outcome, self.setup
        self._tokens = 0
        running = np.array(self.running, dtype=np.int64)
        compacted = running[self.resident[running] >= self.bound[running]]
        if len(compacted):
            freed = self.pages(self.resident[compacted]) - self.pages(self.keep[compacted])
            self.free += int(freed.sum())
            self.resident[compacted] = self.keep[compacted]
        compactions = float(len(compacted))

        decoding = running[self.logical[running] >= self.target[running]]
        stride = self._stride(decoding, running)
        preempted = 0
        while len(decoding):
            grown = self.pages(self.resident[decoding] + stride) - self.pages(self.resident[decoding])
            if int(grown.sum()) <= self.free:
                break
            if stride > 1:
                stride //= 2
                continue
            self._preempt()
            preempted += 1
            running = np.array(self.running, dtype=np.int64)
            decoding = running[self.logical[running] >= self.target[running]]
        if len(decoding):
            self.free -= int(grown.sum())
            compactions += self._decode(decoding, stride)
        for number in running[self.logical[running] < self.target[running]]:
            if not self._chunk(int(number)):
                break
        if not preempted and self._tokens < setup.max_tokens:
            self._admit()

        outcome.peak_running = max(outcome.peak_running, len(self.running))
        outcome.compactions += int(compactions)
        outcome.steps += stride
        now = np.array(self.running, dtype=np.int64)
        tokens = self._tokens if stride == 1 else len(decoding)
        held = int(self.resident[now].sum())
        outcome.seconds += stride * step_time(StepLoad(len(now), tokens, held, compactions / stride))

        done = now[self.logical[now] >= np.maximum(self.last[now], self.target[now])]
        if len(done):
            self.free += int(self.pages(self.resident[done]).sum())
            if setup.limits is not None:
                self.promised -= sum(self._need(int(number)) for number in done)
            gone = set(done.tolist())
            self.running = [number for number in self.running if number not in gone]

    def _stride(self, decoding: np.ndarray, running: np.ndarray) -> int:
        """Steps to take at once: many where every running request decodes and none can end or start on the way."""
        if self.setup.stride == 1 or len(decoding) < len(running) or not len(running):
            return 1
        left = self.last[decoding] - self.logical[decoding]
        return max(1, min(self.setup.stride, int(left.min())))

    def _decode(self, decoding: np.ndarray, stride: int) -> float:
        """Write `stride` tokens each; returns the compactions on the way."""
        self.logical[decoding] += stride
        self.target[decoding] = self.logical[decoding]
        before = self.resident[decoding] + stride
        self._tokens += len(decoding) * stride
        self.resident[decoding] = before
        if stride == 1 or self.setup.limits is None:
            return 0.0
        over = np.maximum(0, before - self.bound[decoding])
        buffer = self.setup.limits.buffer
        times = -(-over // buffer)
        self.resident[decoding] = after = before - times * buffer
        self.free += int((self.pages(before) - self.pages(after)).sum())
        return float(times.sum())
