"""Which tokens survive a compaction, from the log of all tokens and the definitions of the policies in PyTorch.

Nothing of the worker is used: neither the cache nor the query ring nor the sums that signals keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import Need
from skipkv_vllm.core.orders import Compaction
from skipkv_vllm.policies import Policy, View
from tests.simulation.sentences import Sentences, sentences_of
from tests.small_engine.log import Log


@dataclass
class Held:
    """What a request holds and what it has accumulated, by layer, kv head and logical position.

    Attributes:
        row: of its tokens in the log.
        policy: its method.
        num_prompt, protected: of the request.
        first_summed: first token whose query counts in sums.
        mask: bool `[layers, H, max_length]`, tokens that the cache holds.
        mass, error, seen_by: float64 likewise: attention received, output error and number of queries that it is of.
    """

    row: int
    policy: Policy
    num_prompt: int
    protected: int
    first_summed: int
    mask: Tensor
    mass: Tensor = field(init=False)
    error: Tensor = field(init=False)
    seen_by: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mass, self.error, self.seen_by = (torch.zeros_like(self.mask, dtype=torch.float64) for _ in range(3))


class Verdict(NamedTuple):
    """The survivors of a compaction by definition.

    Attributes:
        kept: bool `[layers, H, max_length]`.
        scores: float32 likewise, minus infinity where no token is held; of sentences, that of the token's sentence.
        pinned: bool likewise, tokens that stay whatever their score.
    """

    kept: Tensor
    scores: Tensor
    pinned: Tensor


@dataclass
class _Text:
    """As much of a request as `sentences_of` reads."""

    tokens: list[int]
    hidden: list[Tensor]
    first_tracked: int


def received(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, num_logical: int
) -> tuple[Tensor, Tensor]:
    """Return the attention that tokens receive and the error of the output without each: `A` and `A^2 |v - o|^2`.

    Both are summed over the queries and averaged over the query heads of a kv head. In double precision, because the
    terms of the distance nearly cancel.

    Args:
        queries: `[n, Hq, D]`, of the newest tokens, oldest first.
        keys, values: `[H, L, D]`.
        positions: int64 `[H, L]`.
        num_logical: position of the next token.

    Returns:
        float64 `[H, L]` each.
    """
    number, heads = len(queries), len(keys)
    grouped = queries.double().unflatten(1, (heads, -1))
    logits = torch.einsum("nhgd,hld->hgnl", grouped, keys.double()) / keys.shape[-1] ** 0.5
    reach = num_logical - number + torch.arange(number, device=keys.device)
    future = positions[:, None, None] > reach[:, None]
    weights = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
    outputs = torch.einsum("hgnl,hld->hgnd", weights, values.double())
    distance = torch.cdist(outputs.flatten(1, 2), values.double(), compute_mode="donot_use_mm_for_euclid_dist")
    errors = weights.square() * distance.square().unflatten(1, weights.shape[1:3])
    return weights.sum(dim=2).mean(dim=1), errors.sum(dim=2).mean(dim=1)


class Definition:
    """Computes survivors.

    Args:
        config: of the server.
        log: all tokens.
        text: token ids by row, see `Buffers`.
    """

    def __init__(self, config: KVPolicyConfig, log: Log, text: Tensor) -> None:
        self._config, self._log, self._text = config, log, text

    def verdict(self, request: Held, order: Compaction) -> Verdict:
        """Return the survivors of a compaction, and count the queries since the last one."""
        self._accumulate(request, order.num_logical)
        layers, heads, length = request.mask.shape
        position = torch.arange(length, device=request.mask.device)
        policy = request.policy
        pinned = (position < max(request.protected, policy.num_sinks)) | (
            position >= order.num_logical - self._config.kv_window
        )
        pinned = (pinned & request.mask).expand(layers, heads, length)
        sentences = self._sentences(request, order)
        scores = torch.full(request.mask.shape, -torch.inf, device=position.device)
        for layer in range(layers):
            held = self._positions(request, layer)
            found = policy.score(self._view(request, order, layer, held, sentences))
            scores[layer].scatter_(-1, held, found)
        decay = policy.decay ** (self._config.kv_buffer / 128)
        request.error *= decay
        request.seen_by *= decay
        if self._config.kv_granularity == "sentence":
            assert sentences is not None
            return self._by_sentence(request, order, scores, pinned, sentences)
        ranked = scores.masked_fill(pinned, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(request.mask).scatter_(-1, ranked[..., : order.num_keep], True)
        return Verdict(kept, scores, pinned)

    @staticmethod
    def _positions(request: Held, layer: int) -> Tensor:
        """Positions that a layer holds, ascending, int64 `[H, L]`."""
        return request.mask[layer].nonzero()[:, 1].view(request.mask.shape[1], -1)

    def _of_held(self, entries: Tensor, request: Held, layer: int, held: Tensor) -> Tensor:
        """Return what the log has of the held tokens, `[H, L, D]`."""
        by_head = entries[request.row, layer].transpose(0, 1)
        return by_head.gather(1, held[..., None].expand(-1, -1, by_head.shape[-1]))

    def _view(self, request: Held, order: Compaction, layer: int, held: Tensor, sentences: Sentences | None) -> View:
        window, needs = self._config.kv_window, request.policy.needs
        inputs: dict[str, Any] = {
            "keys": self._of_held(self._log.keys, request, layer, held).transpose(0, 1),
            "values": self._of_held(self._log.values, request, layer, held).transpose(0, 1),
            "queries": self._log.queries[request.row, layer, order.num_logical - window : order.num_logical],
        }
        if needs & Need.ATTENTION_MASS:
            inputs["attention_mass"] = request.mass[layer].gather(-1, held).float()
        if needs & Need.OUTPUT_ERROR:
            error, number = (x[layer].gather(-1, held) for x in (request.error, request.seen_by))
            inputs["output_error"] = (error / number.clamp(min=1)).float()
        if sentences is not None and needs & (Need.HIDDEN | Need.RECURRENCE):
            by_position = [sentences.penalty(position) for position in range(order.num_logical)]
            inputs["sentence_penalty"] = torch.tensor(by_position, device=held.device)[held]
        return View(
            positions=held.int(),
            window=window,
            num_keep=order.num_keep,
            num_logical=order.num_logical,
            num_prompt=request.num_prompt,
            num_protected=request.protected,
            layer=layer,
            **inputs,
        )

    def _sentences(self, request: Held, order: Compaction) -> Sentences | None:
        if not (request.policy.needs & Need.SENTENCES or self._config.kv_granularity == "sentence"):
            return None
        tokens = self._text[request.row, : order.num_logical].tolist()
        hidden = self._log.hidden[request.row, : order.num_logical].float().cpu()
        return sentences_of(_Text(tokens, list(hidden), request.protected), self._config)  # type: ignore[arg-type]

    # ---- sums over queries

    def _accumulate(self, request: Held, num_logical: int) -> None:
        """Count the queries that have come since the last compaction; they saw the tokens that are held now."""
        first, request.first_summed = request.first_summed, num_logical
        if not request.policy.needs & (Need.ATTENTION_MASS | Need.OUTPUT_ERROR):
            return
        for layer in range(request.mask.shape[0]):
            held = self._positions(request, layer)
            keys, values = (self._of_held(x, request, layer, held) for x in (self._log.keys, self._log.values))
            queries = self._log.queries[request.row, layer, first:num_logical]
            mass, error = received(queries, keys, values, held, num_logical)
            request.mass[layer].scatter_add_(-1, held, mass)
            request.error[layer].scatter_add_(-1, held, error)
            seen_by = (num_logical - held).clamp(max=num_logical - first).double()
            request.seen_by[layer].scatter_add_(-1, held, seen_by)

    # ---- whole sentences

    def _by_sentence(
        self, request: Held, order: Compaction, scores: Tensor, pinned: Tensor, sentences: Sentences
    ) -> Verdict:
        """Let the sentences with the lowest mean score leave; the last one to leave loses its earliest tokens only."""
        free = (request.mask & ~pinned)[0, 0].nonzero()[:, 0].tolist()
        mean = scores.mean(dim=(0, 1)).tolist()
        groups: dict[int, list[int]] = {}
        for position in free:
            groups.setdefault(sentences.number(position), []).append(position)
        worth = {number: sum(mean[p] for p in tokens) / len(tokens) for number, tokens in groups.items()}
        leaving = [p for number in sorted(groups, key=lambda n: (worth[n], n)) for p in groups[number]]
        kept, by_sentence = request.mask.clone(), torch.full_like(scores, -torch.inf)
        kept[..., leaving[: order.num_resident - order.num_keep]] = False
        for number, tokens in groups.items():
            by_sentence[..., tokens] = worth[number]
        return Verdict(kept, by_sentence, pinned)
