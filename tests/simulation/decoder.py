"""Computing tokens ahead: queries are drawn with the order, and handed out when the runtime computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipkv_vllm.core.limits import ceil_div
from tests.simulation.model import DIM, KV_HEADS, Q_HEADS
from tests.simulation.request import Lookahead, Running

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation


@dataclass
class FakeDecoder:
    """Stands in for the model that computes tokens ahead: checks its input, and returns queries drawn before."""

    sim: Simulation
    max_length: int
    max_tokens: int = 5

    def decode(
        self, tokens: Tensor, starts: list[int], num_held: list[int], table: Tensor, page_size: int, num_tokens: int = 0
    ) -> Tensor:
        found = []
        assert tokens.numel() <= self.max_tokens
        for r, start in enumerate(starts):
            (request,) = (each for each in self.sim.running.values() if each.num_logical == start)
            num_read = request.num_lookahead
            if num_tokens:
                assert start == request.num_prompt
                assert tokens[r] == request.logits.argmax()
                assert num_read == num_tokens
            else:
                assert start < request.num_prompt
                assert tokens[r].tolist() == request.question[-num_read:]
                self._append_question(request, table[r], page_size, num_held[r])
            assert table[r].unique().numel() * page_size >= num_held[r] + num_read
            for layer, pages in enumerate(self.sim.pool.layers):
                held = pages.keys.read_pages(table[r, : ceil_div(num_held[r], page_size)].long(), num_held[r])
                assert [sorted(head) for head in held.tolist()] == request.lookahead.cache[layer]
            found.append(request.lookahead.queries)
        return torch.stack(found)

    def _append_question(self, request: Running, table: Tensor, page_size: int, num_held: int) -> None:
        """Write the question's keys behind the held tokens."""
        for i in range(request.num_lookahead):
            page, offset = table[(num_held + i) // page_size].long(), (num_held + i) % page_size
            for layer, keys in enumerate(request.lookahead.question_keys[:, i]):
                self.sim.pool.write_page(layer, page, offset, keys, keys)

    def question(self, request_id: str, num_tokens: int) -> list[int]:
        return self.sim.running[request_id].question[-num_tokens:]

    # ---- with the order of a compaction

    def draw(self, request: Running, keep: int) -> int:
        """Draw what will be computed ahead of a request that is compacted to `keep` tokens.

        Returns:
            The number of blocks it takes; 0 if nothing is computed ahead.
        """
        config = self.sim.config
        plan, request.lookahead = config.policy.lookahead_plan, None
        if plan is None or not self.sim.has_spare_blocks or request.num_logical > request.num_prompt:
            return 0
        is_question = plan.draft is None
        if is_question == (request.num_logical == request.num_prompt):
            return 0
        num_tokens = config.policy.num_question(config.kv_window) if is_question else plan.num_tokens
        num_blocks = ceil_div(num_tokens if is_question else keep + num_tokens, self.sim.block_size)
        num_tokens = min(num_tokens, self.max_length - request.num_logical)
        layers = len(request.dense)
        queries = self.sim.random(layers, num_tokens, Q_HEADS, DIM)
        if is_question:
            held = [[sorted(c.key.tolist() for c in cells) for cells in heads] for heads in request.dense]
            request.lookahead = Lookahead(queries, held, self.sim.random(layers, num_tokens, KV_HEADS, DIM))
        else:
            request.lookahead = Lookahead(queries, self._draft_cache(request, keep, plan.draft.pool))
        return num_blocks

    def _draft_cache(self, request: Running, keep: int, pool: int) -> list[list[list[list[float]]]]:
        """Keys of a copy of the cache that SnapKV has compacted, by layer and head, sorted."""
        window, copy = self.sim.config.kv_window, []
        for layer, heads in enumerate(request.dense):
            copy.append([])
            for head, cells in enumerate(heads):
                scores = self.sim.dense.snapkv(request, layer, head, request.num_logical, pool)
                ranked = sorted(range(len(cells) - window), key=lambda i: (-scores[i], i))
                kept = [*ranked[: keep - window], *range(len(cells) - window, len(cells))]
                copy[-1].append(sorted(cells[i].key.tolist() for i in kept))
        return copy
