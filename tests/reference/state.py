"""A request's text and KV cache, with everything that scores are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from tests.reference import formulas
from tests.reference.model import Model
from tests.reference.recall import NUM_ANSWERING, NUM_ASKING, RecalledTokens
from tests.reference.selection import select_sentences, select_tokens
from tests.reference.sentences import Sentence, sentence_of_token, split_sentences
from tests.reference.settings import Settings, Steering
from tests.reference.steering import alpha_at

NUM_SINKS = {"streaming_llm": 4}
DECAY = 0.7


class State:
    """A request's text and KV cache.

    Args:
        model: the model.
        prompt: token ids.
        settings: method and limits.

    Attributes:
        text: token ids of the prompt and the answer.
        num_computed: tokens that the model has read.
        cache: keys and values of the held tokens, of all layers.
        positions: int64 `[layers, heads, held]`, ascending; here and below of the layers with full attention.
        hidden: `[num_computed, hidden]` states after the final norm.
        queries: post-RoPE queries of the last W tokens, `[layers, Hq, W, D]`.
        asking: those of the last `NUM_ASKING` tokens.
        logits: of the last token, `[vocab]`.
        mass: attention that each held token has received, `[layers, heads, held]`.
        errors: accumulated change of the output without each held token, of the same shape.
        num_seen: number of queries in `errors`.
        log_betas: output of the learned gates, of the same shape.
        sparsities: of the attention at the end of every segment.
        shrinks: steps by which each segment was shrunk for lack of room.
        alphas: strength of the steering by position.
        recalled: tokens that may come back; None if none may.
    """

    def __init__(self, model: Model, prompt: Sequence[int], settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.num_prompt = len(prompt)
        self.text = list(prompt)
        self.num_computed = 0
        self.cache = model.new_cache()
        self.positions = torch.empty(0, dtype=torch.int64)
        self.hidden = self.queries = self.asking = self.logits = torch.empty(0)
        self.mass = self.errors = self.num_seen = self.log_betas = self.owner_sums = torch.empty(0)
        self.by_segment = dict(settings.parameters) if settings.method == "thinkv" else None
        self.sparsities: list[float] = []
        self.shrinks: list[int] = []
        self.alphas: list[float] = []
        self.num_protected = len(prompt) if settings.protect_prompt else 0
        self.keep = settings.keep(len(prompt))
        num_recalled = settings.num_recalled(len(prompt))
        self.recalled = RecalledTokens(num_recalled, settings.recall_threshold) if num_recalled else None
        # Queries count from the prompt's last one on, or from one buffer before the first compaction.
        first_bound = settings.bound(len(prompt), is_first=True)
        self._first_counted = min(len(prompt) - 1, first_bound - settings.buffer)

    @property
    def num_resident(self) -> int:
        """Tokens that every head holds."""
        return self.positions.shape[2]

    @property
    def layers(self) -> list[Any]:
        """Keys and values of the layers with full attention, `[1, heads, held, D]`."""
        return self.model.full_layers(self.cache)

    # ---- the forward pass

    def feed(self, token_ids: list[int]) -> Tensor:
        """Compute the next tokens of the text.

        Returns:
            Logits of the last one `[vocab]`.
        """
        added = None
        if self.settings.steering is not None:
            added = self.settings.steering.layer, self._steered(len(token_ids), self.settings.steering)
        self.logits, hidden, queries = self.model.forward(token_ids, self.num_computed, self.cache, added)
        new = torch.arange(self.num_computed, self.num_computed + len(token_ids))
        layers, heads = len(self.layers), self.layers[0].keys.shape[1]
        if self.num_computed == 0:
            self.hidden, self.queries = hidden, queries
            self.positions = new.expand(layers, heads, -1)
        else:
            self.hidden = torch.cat([self.hidden, hidden])
            self.queries = torch.cat([self.asking, queries], dim=2)
            self.positions = torch.cat([self.positions, new.expand(layers, heads, -1)], dim=2)
        self.asking = self.queries[:, :, -NUM_ASKING:]
        self.queries = self.queries[:, :, -self.settings.window :]
        self._accumulate(new)
        if self.recalled is not None:
            self.recalled.store(self.layers, len(token_ids))
        if self.settings.method == "trimkv":
            log_betas = self.model.log_betas()
            self.log_betas = log_betas if self.num_computed == 0 else torch.cat([self.log_betas, log_betas], dim=2)
        self.num_computed += len(token_ids)
        written = self.num_computed - self.num_protected
        if self.by_segment is not None and written > 0 and written % self.by_segment["segment"] == 0:
            self.sparsities.append(self._sparsity([int(number) for number in self.by_segment["layers"].split(",")]))
        return self.logits

    def _steered(self, num_new: int, steering: Steering) -> Tensor:
        """What steering adds to the newest tokens, `[new, hidden]`."""
        for position in range(self.num_computed, self.num_computed + num_new):
            self.alphas.append(alpha_at(self.model, self.text, self.num_prompt, position, steering))
        return torch.tensor(self.alphas[-num_new:])[:, None] * steering.vector

    def _accumulate(self, new: Tensor) -> None:
        """Add the attention of the queries at positions `new`: of one token, or of the beginning of the prompt."""
        heads = self.layers[0].keys.shape[1]
        weights = torch.cat([layer.self_attn.recorded_weights for layer in self.model.evicting])
        weights = weights[:, :, new >= self._first_counted].unflatten(1, (heads, -1))  # [layers, heads, G, rows, held]
        mass = weights.sum(dim=3).mean(dim=2)
        known = self.mass.shape[2] if self.mass.dim() == 3 else 0
        padding = (0, mass.shape[2] - known)
        self.mass = mass + (F.pad(self.mass, padding) if known else 0)
        if not self.settings.by_error:
            return
        errors = torch.zeros_like(mass)
        for i, layer in enumerate(self.layers):
            for row in weights[i].unbind(dim=2):
                outputs = row @ layer.values[0]  # [heads, G, D]
                distance = (layer.values[0][:, None] - outputs[:, :, None]).square().sum(dim=-1)
                errors[i] += (row.square() * distance).mean(dim=1)
        rows = new[new >= self._first_counted]
        seen = (rows[:, None, None, None] >= self.positions).sum(dim=0).float()
        self.errors = errors + (F.pad(self.errors, padding) if known else 0)
        self.num_seen = seen + (F.pad(self.num_seen, padding) if known else 0)

    def _sparsity(self, layers: list[int]) -> float:
        heads = [(queries, keys) for queries, keys, (layer, _) in self.heads() if layer in layers]
        return sum(formulas.sparsity(*each) for each in heads) / len(heads)

    # ---- reading

    def heads(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """Yield by layer and kv head the last queries `[W, group, D]`, the held keys `[held, D]` and both indices."""
        for i, layer in enumerate(self.layers):
            queries = self.queries[i].unflatten(0, (layer.keys.shape[1], -1)).transpose(1, 2)
            for head in range(len(queries)):
                yield queries[head], layer.keys[0, head], (i, head)

    def sentences(self) -> list[Sentence]:
        """Closed sentences of the computed text, after a protected prompt."""
        return self._split()[0]

    def _split(self) -> tuple[list[Sentence], int]:
        return split_sentences(self.text[: self.num_computed], self.num_protected, self.model.delimiters)

    def pinned(self) -> Tensor:
        """Tokens that always stay, bool `[layers, heads, held]`."""
        first = max(self.num_protected, NUM_SINKS.get(self.settings.method, 0))
        pinned = (self.positions < first) | (self.positions >= self.num_computed - self.settings.window)
        if self.settings.method == "finch":
            question = self.num_prompt - self.settings.num_question
            pinned |= (self.positions >= question) & (self.positions < self.num_prompt)
        return pinned

    # ---- eviction

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Survivors by token scores, and the scores that decide, both `[layers, heads, held]`."""
        pinned = self.pinned()
        survives = torch.zeros_like(pinned)
        if self.settings.granularity == "head":
            for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
                survives[tuple(index)] = select_tokens(scores[tuple(index)], pinned[tuple(index)], self.keep)
            return survives, scores
        owner = sentence_of_token(self.positions[0, 0], *self._split())
        common, by_sentence = select_sentences(scores.mean(dim=(0, 1)), pinned[0, 0], owner, self.keep)
        return common.expand_as(survives), by_sentence.expand_as(scores)

    def copy(self, survives: Tensor) -> DynamicCache:
        """Return a cache of the marked tokens `[layers, heads, held]`, the same number in each head."""
        cache, masks = self.model.new_cache(), dict(zip(self.model.full, survives, strict=True))
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, LinearAttentionLayer):
                cache.layers[i] = layer  # whatever is evicted, a state is of all tokens
                continue
            if i not in masks:
                cache.update(layer.keys, layer.values, i)
                continue
            mask = masks[i]
            index = torch.stack([row.nonzero().flatten() for row in mask])[None, :, :, None]
            kept = [x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values)]
            cache.update(*kept, i)
        return cache

    def recall(self, scores: Tensor | None = None) -> None:
        """Hold the stored tokens that the last queries ask for, in place of those with the lowest scores.

        Args:
            scores: of the tokens that a compaction kept, `[layers, heads, held]`; None without a compaction.
        """
        assert self.recalled is not None
        if scores is not None:
            if self.settings.granularity == "sentence":
                scores = scores.mean(dim=(0, 1)).expand_as(scores)
            scores = scores.masked_fill(self.pinned(), torch.inf)
            self.recalled.compacted(self.positions, scores, self.num_protected, self.num_computed)
            self.owner_sums = torch.zeros(3, *scores.shape[:2], 0)
            if self.num_computed < self.num_prompt - 8:
                # Others are asked for at its end.
                return
        owner = sentence_of_token(torch.arange(self.num_computed), *self._split())
        may_answer = self.num_computed < self.num_prompt + NUM_ANSWERING
        held = self.recalled.choose(self.positions, self.asking, owner, may_answer=may_answer)
        sums = [self.mass, *((self.errors, self.num_seen) if self.settings.by_error else ())]
        # Sums follow their tokens. Those of an owner wait for it, others are lost when a token leaves.
        known = torch.nn.functional.pad(self.owner_sums, (0, self.num_computed - self.owner_sums.shape[-1]))
        known = torch.stack([old.scatter(2, self.positions, new) for old, new in zip(known, sums, strict=False)])
        self.mass, *others = known.gather(3, held.expand(len(known), -1, -1, -1))
        if self.settings.by_error:
            self.errors, self.num_seen = others
        self.owner_sums = known * self.recalled.is_owner(self.num_computed).view(known.shape[1:])
        cache = self.model.new_cache()
        for i, layer in enumerate(self.cache.layers):
            if i in self.model.full:
                cache.update(*self.recalled.read(self.model.full.index(i), held), i)
            elif isinstance(layer, LinearAttentionLayer):
                cache.layers[i] = layer
            else:
                cache.update(layer.keys, layer.values, i)
        self.cache, self.positions = cache, held

    def evict(self, survives: Tensor) -> None:
        """Keep the marked tokens `[layers, heads, held]` only."""
        self.cache = self.copy(survives)
        shape = (*survives.shape[:2], self.keep)
        self.positions = self.positions[survives].view(shape)
        self.mass = self.mass[survives].view(shape)
        if self.settings.by_error:
            left = DECAY ** (self.settings.buffer / 128)
            self.errors, self.num_seen = (left * x[survives].view(shape) for x in (self.errors, self.num_seen))
        if self.settings.method == "trimkv":
            self.log_betas = self.log_betas[survives].view(shape)
