"""Compactions done a second time: loops over lists of tokens, from the formulas of the methods."""

from __future__ import annotations

from collections.abc import Callable

import torch

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, Need
from skipkv_vllm.core.orders import Compaction
from tests.reference import formulas
from tests.simulation.formulas import attention_of, error_of, hashed, importance_of, redundancy_of
from tests.simulation.model import KV_HEADS, of_head
from tests.simulation.request import Running
from tests.simulation.sentences import Sentences, sentences_of
from tests.simulation.worker import Worker


class Dense:
    """Keeps the dense tokens of requests up to date.

    Args:
        config: the server's policy.
        worker: knows the policies of requests.
    """

    def __init__(self, config: KVPolicyConfig, worker: Worker) -> None:
        self._config = config
        self._worker = worker

    # ---- what is accumulated

    def accumulate(self, request: Running) -> None:
        """Add the attention of the newest query, from the prompt's last token on."""
        if not self._config.needs & ACCUMULATED or request.num_logical < request.num_prompt:
            return
        for layer, heads in enumerate(request.dense):
            for head, cells in enumerate(heads):
                query, keys = of_head(request.queries[-1][layer], head), [cell.key for cell in cells]
                if self._config.needs & Need.OUTPUT_ERROR:
                    values = torch.stack([cell.value for cell in cells])
                    for cell, error in zip(cells, error_of(query, keys, values), strict=True):
                        known = request.errors.get((layer, head, cell.position), (0.0, 0.0))
                        request.errors[layer, head, cell.position] = (known[0] + error, known[1] + 1)
                    continue
                for cell, weight in zip(cells, attention_of(query, keys), strict=True):
                    key = (layer, head, cell.position)
                    request.mass[key] = request.mass.get(key, 0.0) + weight

    def sparsity(self, request: Running, count: int) -> float:
        """Return the sparsity of the attention of the newest queries, over the layers that count."""
        chosen = self._config.policy.segment_options.layers or range(len(request.dense))
        shares = []
        for layer in chosen:
            for head, cells in enumerate(request.dense[layer]):
                keys = torch.stack([cell.key for cell in cells])
                shares.append(formulas.sparsity(request.newest_queries(layer, head, count), keys))
        return sum(shares) / len(shares)

    # ---- selection

    def compact(self, request: Running, order: Compaction) -> None:
        """Carry out a compaction on the dense tokens."""
        sentences = sentences_of(request, self._config)
        if self._config.needs & Need.SEGMENTS:
            self._shrink_segments(request, order)
        scores = [
            [self._scores(request, layer, head, sentences, order) for head in range(KV_HEADS)]
            for layer in range(len(request.dense))
        ]
        policy, window = self._worker.policy_of(request.name), self._config.kv_window
        first = max(request.protected, policy.num_sinks)
        question = range(request.num_prompt - policy.num_question(window), request.num_prompt)

        def pinned(position: int) -> bool:
            return position < first or position in question or position >= order.num_logical - window

        left = policy.decay ** (self._config.kv_buffer / 128)
        request.errors = {key: (left * e, left * n) for key, (e, n) in request.errors.items()}
        if self._config.kv_granularity == "head":
            self._evict_by_head(request, scores, pinned, order.num_keep)
        else:
            self._evict_by_sentence(request, scores, pinned, order.num_keep, sentences)

    @staticmethod
    def _evict_by_head(
        request: Running, scores: list[list[list[float]]], pinned: Callable[[int], bool], num_keep: int
    ) -> None:
        for layer, heads in enumerate(request.dense):
            for head, cells in enumerate(heads):
                free = [i for i, cell in enumerate(cells) if not pinned(cell.position)]
                free.sort(key=lambda i: (-scores[layer][head][i], i))
                evicted = set(free[num_keep - (len(cells) - len(free)) :])
                heads[head] = [cell for i, cell in enumerate(cells) if i not in evicted]

    @staticmethod
    def _evict_by_sentence(
        request: Running,
        scores: list[list[list[float]]],
        pinned: Callable[[int], bool],
        num_keep: int,
        sentences: Sentences,
    ) -> None:
        positions = [cell.position for cell in request.dense[0][0]]
        groups: dict[int, list[int]] = {}
        for i, position in enumerate(positions):
            if not pinned(position):
                groups.setdefault(sentences.number(position), []).append(i)
        total = [sum(of_head[i] for of_layer in scores for of_head in of_layer) for i in range(len(positions))]
        worth = {number: sum(total[i] for i in tokens) / len(tokens) for number, tokens in groups.items()}
        evicted: set[int] = set()
        for number in sorted(groups, key=lambda n: (worth[n], n)):
            evicted |= set(groups[number][: len(positions) - num_keep - len(evicted)])
        for heads in request.dense:
            for head, cells in enumerate(heads):
                heads[head] = [cell for i, cell in enumerate(cells) if i not in evicted]

    # ---- segments

    def _segment(self, request: Running, position: int) -> int | None:
        """Number of the segment of a token; None for tokens of the prompt and the window."""
        if not request.protected <= position < request.num_logical - self._config.kv_window:
            return None
        return (position - request.protected) // self._config.policy.segment_options.length

    def _shrink_segments(self, request: Running, order: Compaction) -> None:
        """Decide how many tokens of each segment may stay."""
        policy, segments = self._config.policy, request.segments
        numbers = [self._segment(request, position) for position in range(request.num_logical)]
        sizes = [numbers.count(number) for number in sorted({n for n in numbers if n is not None})]
        num_free = order.num_keep - request.protected - self._config.kv_window
        bounds = policy.transition_above, policy.execution_below
        found = formulas.quotas(segments.sparsities, segments.steps, sizes, num_free, *bounds)
        segments.quota, segments.order, segments.steps = found

    # ---- scores

    def snapkv(self, request: Running, layer: int, head: int, num_logical: int, pool: int) -> list[float]:
        """Return the scores of SnapKV for the held tokens of a kv head."""
        cells, window = request.dense[layer][head], self._config.kv_window
        total = [0.0] * len(cells)
        for position in range(num_logical - window, num_logical):
            seen = [cell.key for cell in cells if cell.position <= position]
            for j, weight in enumerate(attention_of(of_head(request.queries[position][layer], head), seen)):
                total[j] += weight
        old, reach = total[:-window], pool // 2
        return [max(old[max(0, i - reach) : i + reach + 1]) for i in range(len(old))] + [0.0] * window

    def _scores(self, request: Running, layer: int, head: int, sentences: Sentences, order: Compaction) -> list[float]:
        """Scores of the held tokens of a kv head by the request's method."""
        policy, cells = self._worker.policy_of(request.name), request.dense[layer][head]
        num_logical, window = order.num_logical, self._config.kv_window
        if policy.name == "streaming_llm":
            return [float(cell.position) for cell in cells]
        if policy.name == "random":
            return [hashed(policy.seed, layer, head, cell.position, num_logical) for cell in cells]
        if policy.name == "h2o":
            oldest_recent = num_logical - int(policy.recent_share * order.num_keep)
            masses = [request.mass.get((layer, head, cell.position), 0.0) for cell in cells]
            # Recent tokens go before the others, and the newest before the heaviest.
            return [1e6 + c.position if c.position >= oldest_recent else m for c, m in zip(cells, masses, strict=True)]
        if policy.name == "trimkv":
            return formulas.trimkv([cell.log_beta for cell in cells], [cell.position for cell in cells])
        keys = torch.stack([cell.key for cell in cells])
        if policy.needs & Need.OUTPUT_ERROR:
            known = [request.errors.get((layer, head, cell.position), (0.0, 0.0)) for cell in cells]
            return formulas.skipkv(
                [error / max(num_queries, 1) for error, num_queries in known],
                keys,
                [sentences.penalty(cell.position) for cell in cells],
                [cell.position for cell in cells],
                range(request.protected, num_logical - window),
                num_logical - formulas.num_recent(order.num_keep, request.protected),
            )
        queries = request.newest_queries(layer, head, window)
        if policy.name == "thinkv":
            numbers = [self._segment(request, cell.position) for cell in cells]
            return formulas.thinkv(keys, numbers, request.segments.quota, request.segments.order)
        ahead = request.lookahead
        if policy.name == "laq" and ahead is not None:
            drafted = of_head(ahead.queries[layer], head)
            return formulas.laq(drafted, queries if policy.with_window else queries[:0], keys, window)
        if policy.name in ("snapkv", "laq"):
            return self.snapkv(request, layer, head, num_logical, policy.pool)
        if policy.name == "finch":
            if ahead is not None:
                extended = torch.cat([keys, ahead.question_keys[layer, :, head]])
                return formulas.finch(of_head(ahead.queries[layer], head), extended)[: len(cells)]
            in_prompt = num_logical <= request.num_prompt
            return formulas.finch(queries[-policy.num_question(window) :] if in_prompt else queries, keys)
        if policy.name not in ("rkv", "skipkv"):
            values = torch.stack([cell.value for cell in cells])
            mass = torch.tensor([request.mass.get((layer, head, cell.position), 0.0) for cell in cells])
            options = {k: v for k, v in vars(policy).items() if v != getattr(type(policy), k)}
            return formulas.score(policy.name, options, queries, keys, values, mass)
        importance = importance_of(queries, keys, window, policy.pool)
        redundancy = redundancy_of(keys, policy.redundancy_threshold)
        scores = [policy.mix * i - (1 - policy.mix) * r for i, r in zip(importance, redundancy, strict=False)]
        scores += [0.0] * window
        if policy.name == "skipkv":
            scores = [s - sentences.penalty(cell.position) for s, cell in zip(scores, cells, strict=True)]
        return scores
