"""Lookahead: compute tokens before a compaction for their queries alone, and forget them.

Either the question is appended to the cache of a request, or the beginning of an answer is decoded on a temporary copy
of the cache that a draft method has compacted. Both use lookahead blocks of the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..core.device import to_device
from ..policies import LookaheadPlan, Policy
from .compaction import Compactor
from .requests import Job, ManagedRequest
from .signals.base import ForwardOutput, Step


class Decoder(Protocol):
    """Runs the model between two steps.

    Attributes:
        max_length: longest sequence, in tokens.
        max_tokens: most tokens of a forward pass.
    """

    max_length: int
    max_tokens: int

    def decode(
        self,
        tokens: Tensor,
        starts: Sequence[int],
        num_held: Sequence[int],
        table: Tensor,
        page_size: int,
        num_tokens: int = 0,
    ) -> Tensor:
        """Read tokens of R requests, then decode more of them greedily.

        Args:
            tokens: integer `[R, n]`.
            starts: logical position of the first token of each request.
            num_held: tokens in the pages so far.
            table: int32 `[R, pages]`, kernel pages with room for the tokens.
            page_size: tokens of a kernel page.
            num_tokens: number of tokens to decode; the last one is not fed back to the model.

        Returns:
            Post-RoPE queries of all tokens that were read, `[R, layers, n + max(num_tokens - 1, 0), Hq, D]`.
        """
        ...

    def question(self, request_id: str, num_tokens: int) -> list[int]:
        """Return the last tokens of a request's prompt."""
        ...


class Lookahead:
    """Fills in the lookahead queries of requests that are about to be compacted.

    Args:
        decoder: runs the model.
        compactor: compacts the temporary copies.
    """

    def __init__(self, decoder: Decoder, compactor: Compactor) -> None:
        self._decoder, self._compactor = decoder, compactor
        self._config = compactor.config
        self._cache = compactor.cache

    def after_forward(self, step: Step, output: ForwardOutput, requests: Mapping[str, ManagedRequest]) -> None:
        """Note the likeliest next token of each request whose prompt is complete now."""
        assert output.logits is not None
        ends, logits = (step.batch.starts + step.batch.counts).tolist(), None
        for i, request_id in enumerate(step.batch.request_ids):
            request = requests.get(request_id)
            if request is not None and request.policy.lookahead_plan is not None and ends[i] == request.num_prompt:
                logits = output.logits() if logits is None else logits
                request.first_draft = logits[i].argmax()

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Compute tokens ahead for the jobs with lookahead blocks; return the jobs with the orders that follow."""
        groups: dict[tuple[LookaheadPlan, int], list[Job]] = {}
        for job in jobs:
            plan, window = job.request.policy.lookahead_plan, self._config.kv_window
            if job.order.lookahead_blocks and plan is not None:
                num_tokens = job.request.policy.num_question(window) if plan.draft is None else plan.num_tokens
                # Each request for itself: its tokens must not depend on the other requests.
                num_tokens = min(num_tokens, self._decoder.max_length - job.order.num_logical)
                groups.setdefault((plan, num_tokens), []).append(job)
        changed: dict[str, Job] = {}
        for (plan, num_tokens), group in groups.items():
            if plan.draft is not None:
                self._draft(group, plan.draft, num_tokens)
                continue
            most = max(1, self._decoder.max_tokens // num_tokens)
            for i in range(0, len(group), most):
                found = self._append_question(group[i : i + most], num_tokens)
                changed |= {job.order.request_id: job for job in found}
        return [changed.get(job.order.request_id, job) for job in jobs]

    def _append_question(self, jobs: Sequence[Job], num_tokens: int) -> list[Job]:
        """Append the question to each cache, in blocks that the compaction then reads as well."""
        longer = [
            Job(order._replace(source_blocks=order.source_blocks + order.lookahead_blocks), request)
            for order, request in jobs
        ]
        questions = [self._decoder.question(order.request_id, num_tokens) for order, _ in jobs]
        tokens = to_device(questions, torch.int64, self._cache.device)
        self._compute(longer, tokens, [o.num_resident for o, _ in jobs], [o.source_blocks for o, _ in longer])
        for _, request in jobs:
            request.num_question = num_tokens
        return longer

    def _draft(self, jobs: Sequence[Job], draft: Policy, num_tokens: int) -> None:
        """Decode the beginning of each answer on a temporary copy of the cache."""
        needs = self._config.needs_of(draft)
        copies = [
            Job(
                order._replace(target_blocks=order.lookahead_blocks[: len(order.target_blocks)]),
                replace(request, policy=draft, needs=needs),
            )
            for order, request in jobs
        ]
        self._compactor.run(copies)
        firsts = [request.first_draft for _, request in jobs if request.first_draft is not None]
        held, blocks = [order.num_keep for order, _ in jobs], [order.lookahead_blocks for order, _ in jobs]
        self._compute(jobs, torch.stack(firsts)[:, None], held, blocks, num_tokens)

    def _compute(
        self,
        jobs: Sequence[Job],
        tokens: Tensor,
        num_held: Sequence[int],
        blocks: Sequence[Sequence[int]],
        num_tokens: int = 0,
    ) -> None:
        """See `Decoder.decode`."""
        starts, table = [order.num_logical for order, _ in jobs], self._cache.table(blocks)
        queries = self._decoder.decode(tokens, starts, num_held, table, self._cache.page_size, num_tokens)
        for (_, request), each in zip(jobs, queries, strict=True):
            request.lookahead_queries = each
