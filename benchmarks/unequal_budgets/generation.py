"""Greedy answers to many problems at once, in a dense cache whose layers and heads may hold unequal numbers of tokens.

Hugging Face's model with an attention function of our own. All prompts are equally long, so all rows are at the same
position, and are compacted in the same step; with equal budgets as the engine does it, token for token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from skipkv_vllm.core.needs import FROM_RECENT_QUERIES, Need
from skipkv_vllm.ops.paging import Layout, PagedCache
from skipkv_vllm.policies import Held, HeldRequest, Policy
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens

from .allocation import Allocation

NOT_HERE = FROM_RECENT_QUERIES | Need.GATES | Need.LOOKAHEAD
"""What policies cannot have in this cache."""


class Holder(Protocol):
    """Computes the attention of a forward pass from queries `[R, Hq, T, D]`, keys and values `[R, H, T, D]`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output, `[R, Hq, T, D]`."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, held: Holder, **_: Any
) -> tuple[Tensor, None]:
    return held.attend(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("held", _attention)
AttentionMaskInterface.register("held", lambda *args, **kwargs: None)


class Layer:
    """The cells of one layer for R rows.

    Attributes:
        cells: keys and values, `[R, H, C, 2 D]`, in ascending position.
        positions: int32 `[R, H, C]`.
        counts: int64 `[R, H]`, cells in use.
        queries: the last W, `[R, Hq, W, D]`.
    """

    def __init__(self, rows: int, heads: int, size: int, room: int) -> None:
        self.cells = torch.zeros(rows, heads, room, 2 * size)
        self.positions = torch.zeros(rows, heads, room, dtype=torch.int32)
        self.counts = torch.zeros(rows, heads, dtype=torch.int64)
        self.queries = torch.empty(0)

    def append(self, key: Tensor, value: Tensor, first: int) -> None:
        """Hold T more tokens, the first of them at position `first`."""
        slot = self.counts[..., None] + torch.arange(key.shape[2])
        cell = torch.cat([key, value], dim=-1)
        self.cells.scatter_(2, slot[..., None].expand_as(cell), cell)
        position = torch.arange(first, first + key.shape[2], dtype=torch.int32)
        self.positions.scatter_(2, slot, position.expand(slot.shape).contiguous())
        self.counts += key.shape[2]

    def newest(self, query: Tensor) -> Tensor:
        """Attention output of one token a row, `[R, Hq, 1, D]`."""
        length = int(self.counts.max())
        keys, values = self.cells[:, :, :length].chunk(2, dim=-1)
        mask = None
        if int(self.counts.min()) < length:
            mask = (torch.arange(length) < self.counts[..., None])[:, :, None]
        # The query heads of a kv head side by side, as if they were its tokens.
        grouped = query.squeeze(2).unflatten(1, (self.counts.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, keys, values, mask).flatten(1, 2).unsqueeze(2)

    def keep(self, kept: Tensor, room: int) -> None:
        """Keep some cells, bool `[R, H, N]`, and free the others."""
        self.counts = kept.sum(-1)
        index = (~kept).sort(dim=-1, stable=True).indices[..., : int(self.counts.max())]
        cells = self.cells.gather(2, index[..., None].expand(*index.shape, self.cells.shape[-1]))
        self.cells = F.pad(cells, (0, 0, 0, room))
        self.positions = F.pad(self.positions.gather(2, index), (0, room))

    def only(self, rows: Tensor) -> None:
        """Forget the other rows."""
        self.cells, self.positions = self.cells[rows], self.positions[rows]
        self.counts, self.queries = self.counts[rows], self.queries[rows]


class Rows:
    """R problems that are being answered.

    Args:
        model: float32, with attention "held".
        prompts: equally long.
        window: queries to remember.
        max_tokens: generated at most.
        tracker: of the sentences, with a slot for each row.

    Raises:
        ValueError: the prompts differ in length.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], window: int, max_tokens: int, tracker: SentenceTracker
    ) -> None:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("prompts of different length cannot be answered in step; use those of one task")
        config = model.config
        self.model, self.window, self.tracker = model, window, tracker
        self.num_prompt = len(prompts[0])
        self.last = self.num_prompt + max_tokens
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.row = torch.arange(len(prompts))
        self.finished = torch.zeros(len(prompts), dtype=torch.bool)
        self.num_logical = 0
        size = config.hidden_size // config.num_attention_heads
        shape = len(prompts), config.num_key_value_heads, size, self.last
        self.layers = [Layer(*shape) for _ in range(config.num_hidden_layers)]
        for slot in range(len(prompts)):
            tracker.reset(slot, self.num_prompt)
        self._feed(torch.tensor(prompts))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        other = copy.copy(self)
        for name in ("tracker", "answers", "row", "finished", "layers"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return bool(self.finished.all()) or self.num_logical >= self.last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held = self.layers[layer]
        held.append(key, value, self.num_logical)
        before = held.queries if self.num_logical else query[:, :, :0]
        held.queries = torch.cat([before, query], dim=2)[:, :, -self.window :]
        if query.shape[2] == 1:
            return held.newest(query)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def _feed(self, token_ids: Tensor) -> None:
        """Compute tokens `[R, T]` and choose the next."""
        positions = torch.arange(self.num_logical, self.num_logical + token_ids.shape[1])[None]
        hidden = self.model.model(
            input_ids=token_ids, position_ids=positions, use_cache=False, held=self
        ).last_hidden_state
        if self.num_logical:
            order = torch.arange(len(self.row))
            spans = torch.stack([self.row, order, torch.ones_like(order), torch.full_like(order, self.num_logical)])
            self.tracker.update(TrackedTokens(token_ids[:, 0], spans, len(order), hidden[:, 0]))
        self.num_logical += token_ids.shape[1]
        self._next = self.model.lm_head(hidden[:, -1]).argmax(-1)

    @torch.inference_mode()
    def advance(self, until: int) -> None:
        """Go on until this many tokens are computed, or every answer has ended."""
        ends = self.model.config.eos_token_id
        while self.num_logical < min(until, self.last) and not self.is_done:
            for i, token, is_finished in zip(
                self.row.tolist(), self._next.tolist(), self.finished.tolist(), strict=True
            ):
                if not is_finished:
                    self.answers[i].append(token)
            self.finished |= self._next == ends
            self._feed(self._next[:, None])

    @torch.inference_mode()
    def compact(self, policy: Policy, allocation: Allocation, keep: int, buffer: int) -> None:
        """Keep, on average over layers and heads, `keep` tokens of each row; those that are finished are forgotten."""
        rows = (~self.finished).nonzero().flatten()
        self.row, self.finished, self._next = self.row[rows], self.finished[rows], self._next[rows]
        for layer in self.layers:
            layer.only(rows)
        penalties = None
        if policy.needs & Need.HIDDEN:
            every = torch.arange(self.num_logical, dtype=torch.int32).expand(len(self.row), 1, 1, -1)
            lengths = torch.full(self.row.shape, self.num_logical)
            penalties = self.tracker.penalties(self.row, every, lengths, self.num_logical)[:, 0, 0]
        scores, pinned = [], []
        for layer in self.layers:
            length = int(layer.counts.max())
            positions, exists = layer.positions[..., :length], torch.arange(length) < layer.counts[..., None]
            scores.append(_scores(policy, layer, positions, penalties, self.window))
            newest = positions >= self.num_logical - self.window
            pinned.append(exists & (newest | (positions < self.num_prompt)))
        num_pinned = self.num_prompt + self.window
        for layer, kept in zip(self.layers, allocation.select(scores, pinned, num_pinned, keep), strict=True):
            layer.keep(kept, buffer)
        held = sum(layer.counts.sum(-1) for layer in self.layers)
        expected = keep * len(self.layers) * self.layers[0].counts.shape[1]
        assert bool((torch.as_tensor(held) == expected).all()), f"{held} tokens are held instead of {expected}"


def _scores(policy: Policy, layer: Layer, positions: Tensor, penalties: Tensor | None, window: int) -> Tensor:
    """float32 `[R, H, N]`; minus infinity for cells that are not in use. Every head of a row counts as a request."""
    rows, heads, length = positions.shape
    counts, flat = layer.counts.flatten(), positions.flatten(0, 1)
    newest = flat.gather(1, counts[:, None] - 1).flatten()
    held = Held(
        # A request of one layer and head has one page.
        PagedCache.of([layer.cells.flatten(0, 1)[:, None].contiguous()], Layout.ROWS),
        torch.arange(rows * heads, dtype=torch.int32)[:, None],
        flat[:, None, None].contiguous(),
        [HeldRequest(count, 0, last + 1) for count, last in zip(counts.tolist(), newest.tolist(), strict=True)],
        window,
        queries=layer.queries.unflatten(1, (heads, -1)).flatten(0, 1).transpose(1, 2)[:, None],  # [R H, 1, W, G, D]
        sentence_penalty=None
        if penalties is None
        else penalties.repeat_interleave(heads, dim=0).gather(1, flat.long())[:, None, None].contiguous(),
    )
    return policy.score_batch(held).masked_fill(~held.is_held, -torch.inf).view(rows, heads, length)


class Profile:
    """A forward pass over whole texts in which each token sees only a part; remembers the keys of every layer."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.keys: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys.append(key)
        return F.scaled_dot_product_attention(query, key, value, self.mask, enable_gqa=True)


@torch.inference_mode()
def layer_similarity(model: Any, texts: Tensor, num_prompt: int, block: int, stretch: int = 100) -> list[float]:
    """How little a layer's keys change when its tokens see only the prompt, their block and half of the one before.

    EpiCache's profile: the mean cosine of keys with and without that mask, over stretches of tokens (arXiv 2509.17396).

    Args:
        model: with attention "held".
        texts: int64 `[R, T]`, prompts and answers.
        num_prompt: tokens of a prompt, which stand for the sinks.
        block: tokens between two compactions.
        stretch: tokens whose keys are compared as one vector.
    """
    length = texts.shape[1]
    order = torch.arange(length)
    past = order <= order[:, None]
    sees = (order < num_prompt) | (order >= order[:, None] // block * block - block // 2)
    keys = []
    for mask in (past, past & sees):
        profile = Profile(mask)
        model.model(input_ids=texts, position_ids=order[None], use_cache=False, held=profile)
        keys.append(profile.keys)
    return [
        float(
            torch.stack(
                [
                    F.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1).mean()
                    for a, b in zip(full.split(stretch, 2), masked.split(stretch, 2), strict=True)
                ]
            ).mean()
        )
        for full, masked in zip(*keys, strict=True)
    ]
