"""Eviction of running requests on Hugging Face transformers: the independent reference of the engine tests.

It shares no code with the package. It is written for clarity: one request, dense tensors, sentences and
penalties from scratch at every compaction. Axes are `layers`, `heads` (kv heads), `held` (tokens in the
cache, ascending positions) and `W` (the observation window).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tests.reference import formulas

DELIMITER = re.compile(r" ?[.)?!\]}\"'”’。]*\n+")
NUM_SINKS = {"streaming_llm": 4}
MIX = 0.1
SIMILAR_KEYS = 0.5
# Repeats of a sentence in the bundled model's thoughts have a cosine of 0.74 to 0.87.
SIMILAR_SENTENCES = 0.85
POOL_KERNEL = 7
LOOKAHEAD = 8
ABOUT_PROMPTS = ("finch", "laq")
EPSILON = 1e-8
H2O_RECENT_SHARE = 0.5
DECAY = 0.7
HASH_STEPS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
TIE_TOLERANCE = 1e-5


class EngineTrace(Protocol):
    """The part of the engine's trace of a request that the reference may look at, near ties only."""

    logical_length: Tensor
    kept: list[Tensor]


@dataclass(frozen=True, eq=False)
class Steering:
    """Adds `min(alpha0 + gamma * N, alpha_max)` times `vector` `[hidden]` to the input of `layer`."""

    layer: int
    vector: Tensor
    alpha0: float
    gamma: float
    alpha_max: float = float("inf")
    interval: int = 128
    compat: str = "default"


@dataclass(frozen=True)
class Settings:
    """Method and limits of a request, in tokens."""

    method: str
    granularity: str
    budget: int
    buffer: int
    window: int = 8
    protect_prompt: bool = True
    defer_prompt: bool = False
    num_question: int = 8
    ask_chunks: bool = False
    lookahead: int = LOOKAHEAD
    with_window: bool = False
    steering: Steering | None = None
    parameters: tuple[tuple[str, Any], ...] = ()
    """of the method, where they differ from its defaults; read by those that work on segments, and for `compat`"""

    @property
    def by_error(self) -> bool:
        """Whether tokens are scored by what leaving them out would change."""
        return self.method == "skipkv" and dict(self.parameters).get("compat", "default") == "default"

    def keep(self, num_prompt: int) -> int:
        """Tokens left by a compaction."""
        return max(self.budget, num_prompt + self.window) if self.protect_prompt else self.budget

    def bound(self, num_prompt: int, is_first: bool) -> int:
        """Tokens at which a compaction takes place."""
        bound = self.keep(num_prompt) + self.buffer
        if not (is_first and self.defer_prompt):
            return bound
        return max(bound, num_prompt if self.method in ABOUT_PROMPTS else num_prompt + self.window)

    def ends_prompt(self, num_prompt: int, num_computed: int, num_resident: int) -> bool:
        """Whether a prompt has just been computed that is compacted there."""
        return self.method in ABOUT_PROMPTS and num_computed == num_prompt and num_resident > self.keep(num_prompt)


@dataclass(frozen=True)
class Event:
    """One compaction; `kept` is int64 `[layers, heads, keep]`, ascending positions of the survivors."""

    num_logical: int
    num_resident: int
    kept: Tensor


@dataclass
class Result:
    """Outcome of one request; ties are survivors that were taken from the engine, of `num_selected` in all."""

    tokens: list[int]
    events: list[Event] = field(default_factory=list)
    num_ties: int = 0
    num_selected: int = 0
    alphas: list[float] = field(default_factory=list)
    """by position, 0 where nothing was added"""
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """by how much the likeliest token was likelier than the one taken, in logarithms; 0 unless an engine chose"""
    sparsities: list[float] = field(default_factory=list)
    """of attention at the end of every segment, where the method asks for it"""


class SelectionError(AssertionError):
    """The engine kept tokens that the reference evicts by a clear margin."""


# ---- the model


def _recording_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Plain causal attention that leaves the post-RoPE queries `[1, Hq, new, D]` on the module."""
    module.recorded_query, module.recorded_weights = query, None
    num_new, num_held = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    # The newest token is the last in the cache whatever was evicted before it, so order is enough.
    hidden = torch.ones(num_new, num_held, dtype=torch.bool).triu(num_held - num_new + 1)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    module.recorded_weights = weights
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", _recording_attention)
AttentionMaskInterface.register("recording", lambda *args, **kwargs: None)


def _record_input(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Leave what enters an attention block, `[1, new, hidden]`, on it."""
    module.recorded_input = kwargs["hidden_states"]


class Model:
    """A float32 causal language model on the CPU and its sentence delimiters."""

    def __init__(self, folder: str) -> None:
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="recording")
        self.lm.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer = tokenizer
        self.texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        self.delimiters = {i for i, text in enumerate(self.texts) if DELIMITER.fullmatch(text)}
        self.added: tuple[int, Tensor] | None = None
        self.gates: list[list[Tensor]] = []
        for layer in self.lm.model.layers:
            layer.register_forward_pre_hook(self._add)
            layer.self_attn.register_forward_pre_hook(_record_input, with_kwargs=True)

    def _add(self, layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.added is None or layer is not self.lm.model.layers[self.added[0]]:
            return None
        return (inputs[0] + self.added[1], *inputs[1:])

    def load_gates(self, path: str) -> None:
        """Read the learned gates of `trimkv`."""
        tensors = load_file(path)
        names = ("linear1.weight", "linear1.bias", "linear2.weight", "bias")
        self.gates = [
            [tensors[f"model.layers.{i}.self_attn.retention_gate.{name}"] for name in names]
            for i in range(len(self.lm.model.layers))
        ]

    def log_betas(self) -> Tensor:
        """What the gates say of the tokens fed last, `[layers, heads, new]`."""
        entering = [layer.self_attn.recorded_input[0] for layer in self.lm.model.layers]
        by_token = [
            [formulas.log_beta(gate, hidden) for hidden in rows]
            for gate, rows in zip(self.gates, entering, strict=True)
        ]
        return torch.tensor(by_token).transpose(1, 2)

    def forward(
        self,
        token_ids: list[int],
        first_position: int,
        cache: DynamicCache,
        added: tuple[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Feed tokens; `added` is a layer and what to add to its input, `[new, hidden]`.

        Returns:
            Logits of the last token `[vocab]`, hidden states after the final norm `[new, hidden]` and
            post-RoPE queries `[layers, Hq, new, D]`.
        """
        positions = torch.arange(first_position, first_position + len(token_ids))[None]
        body = self.lm.model
        self.added = added
        hidden = body(
            input_ids=torch.tensor([token_ids]), position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        queries = torch.cat([layer.self_attn.recorded_query for layer in body.layers])
        return self.lm.lm_head(hidden[0, -1]), hidden[0], queries


# ---- scores


def importance(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that the window pays to each older token.

    Args:
        queries: `[Hq, W, D]`.
        keys: `[heads, held, D]`.

    Returns:
        `[heads, held - W]`.
    """
    num_heads, num_held, size = keys.shape
    window = queries.shape[1]
    grouped = queries.view(num_heads, -1, window, size)
    logits = torch.einsum("hgwd,hkd->hgwk", grouped, keys) / size**0.5
    attention = logits.amax(dim=1)[..., : num_held - window].float().softmax(-1)
    return F.max_pool1d(attention.mean(dim=1), POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)


def redundancy(keys: Tensor) -> Tensor:
    """How much each key `[heads, held, D]` repeats others; `[heads, held]`, sums to one per head."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + EPSILON)
    similarity = unit @ unit.mT
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    num_held = keys.shape[1]
    columns = torch.arange(num_held).expand_as(similarity)
    # The last similar column of each row is spared: the newest copy of a repeated token is not redundant.
    last = torch.where(similarity > SIMILAR_KEYS, columns, 0).amax(-1, keepdim=True)
    similarity.scatter_(-1, last, 0.0)
    return similarity.mean(dim=-2).softmax(-1)


def rkv_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """R-KV score of each held token of a layer, `[heads, held]`; the window's own is 0, it is pinned."""
    important = importance(queries, keys)
    num_old = important.shape[1]
    old = MIX * important - (1 - MIX) * redundancy(keys)[:, :num_old]
    return F.pad(old, (0, keys.shape[1] - num_old))


def snapkv_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the window's queries `[Hq, W, D]` to each held token `[heads, held, D]`, causal, pooled."""
    num_heads, num_held, size = keys.shape
    window = queries.shape[1]
    total = torch.zeros(num_heads, num_held)
    for head in range(num_heads):
        group = queries.view(num_heads, -1, window, size)[head]
        for i in range(window):
            seen = num_held - window + i + 1
            weights = (group[:, i] @ keys[head, :seen].T / size**0.5).softmax(-1)
            total[head, :seen] += weights.mean(dim=0)
    pooled = F.max_pool1d(total[None, :, : num_held - window], POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)[0]
    return F.pad(pooled, (0, window))


def hashed(number: int) -> int:
    """A 32-bit integer hash."""
    for shift, multiplier in HASH_STEPS:
        number = (number ^ number >> shift) * multiplier % 2**32
    return number ^ number >> 15


def random_scores(positions: Tensor, num_computed: int) -> Tensor:
    """The documented random numbers, of `[layers, heads, held]` positions, by plain integer arithmetic."""
    scores = []
    for layer, heads in enumerate(positions.tolist()):
        for head, held in enumerate(heads):
            for position in held:
                state = hashed(num_computed)
                for value in (0, layer, head, position):
                    state = hashed((state + value) % 2**32)
                scores.append(state / 2**32)
    return torch.tensor(scores).view(positions.shape)


@dataclass
class Sentence:
    """Tokens `[start, end)`, of which those before `body_end` make up the embedding."""

    start: int
    body_end: int
    end: int


def split_sentences(token_ids: Sequence[int], first: int, delimiters: set[int]) -> tuple[list[Sentence], int]:
    """Closed sentences of `token_ids[first:]`, and where the open one starts."""
    closed: list[Sentence] = []
    start = first
    for position in range(first, len(token_ids)):
        if token_ids[position] not in delimiters:
            continue
        if closed and start == position:
            closed[-1].end = position + 1
        else:
            closed.append(Sentence(start, position + 1, position + 1))
        start = position + 1
    return closed, start


def sentence_penalties(sentences: list[Sentence], hidden: Tensor) -> list[float]:
    """Similarity of each sentence to the later one that repeats it best, 0 if none does; hidden `[C, H]`."""
    if not sentences:
        return []
    means = torch.stack([hidden[s.start : s.body_end].mean(dim=0) for s in sentences])
    embeddings = means / (means.norm(dim=-1, keepdim=True) + EPSILON)
    cosine = (embeddings @ embeddings.T).triu(1)
    return torch.where(cosine > SIMILAR_SENTENCES, cosine, 0.0).amax(dim=-1).tolist()


def repeated_shares(text: Sequence[int], first: int, sentences: list[Sentence]) -> list[float]:
    """Share of each sentence's tokens that lie in six tokens in a row which occur again later in `text[first:]`."""
    last_start = {tuple(text[i : i + 6]): i for i in range(first, len(text) - 5)}
    repeated = set()
    for i in range(first, len(text) - 5):
        if last_start[tuple(text[i : i + 6])] > i:
            repeated.update(range(i, i + 6))
    return [sum(i in repeated for i in range(s.start, s.end)) / (s.end - s.start) for s in sentences]


# ---- steering


def alpha_at(model: Model, text: list[int], num_prompt: int, position: int, steering: Steering) -> float:
    """How often the vector is added at a position, from the text alone."""
    by_code = steering.compat == "published"
    first = num_prompt - 1 if by_code else num_prompt
    read = [model.texts[token] for token in text[: position + 1]]
    markers = [token for token in read if token in ("<think>", "</think>")]
    if position < first or "\n\n" not in read[-1] or markers[-1:] != ["<think>"]:
        return 0.0
    # N is taken over after positions whose successor is a multiple of the interval; not while the prompt is read.
    taken = [p for p in range(first, position) if (p + 1) % steering.interval == 0]
    num_doubts = 0
    if taken:
        num_doubts = count_doubts(model, text[0 if by_code else num_prompt : taken[-1] + 1], by_code)
    return min(steering.alpha0 + steering.gamma * num_doubts, steering.alpha_max)


def count_doubts(model: Model, text: list[int], by_code: bool) -> int:
    """Closed sentences with a word of doubt."""
    words = ("Wait", "Alternatively", "again")

    def ids(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    if by_code:
        enders = {ids(t)[-1] for t in ("\n", ".\n", ")\n", "\n\n", ".\n\n", ")\n\n", "?\n\n")}
        found = [ids(word)[-1:] for word in words]
        starts = [0] + [i + 1 for i, token in enumerate(text) if token in enders]
        spans = list(itertools.pairwise(starts))
    else:
        found = [
            ids(space + form) for word in words for form in (word, word.lower(), word.title()) for space in ("", " ")
        ]
        spans = [(s.start, s.end) for s in split_sentences(text, 0, model.delimiters)[0]]
    return sum(any(_contains(text[start:end], word) for word in found) for start, end in spans)


def _contains(text: list[int], word: list[int]) -> bool:
    return any(text[i : i + len(word)] == word for i in range(len(text) - len(word) + 1))


# ---- selection


def sentence_of_token(positions: Tensor, sentences: list[Sentence], open_start: int) -> Tensor:
    """Number of the sentence of each position `[held]`; -1 before the first, `len(sentences)` if open."""
    owner = torch.full_like(positions, -1)
    for number, sentence in enumerate(sentences):
        owner[(positions >= sentence.start) & (positions < sentence.end)] = number
    owner[positions >= open_start] = len(sentences)
    return owner


def select(evict_order: Tensor, pinned: Tensor, keep: int) -> Tensor:
    """Mark the survivors.

    Args:
        evict_order: int64 `[held]` indices of the held tokens, the first to leave first.
        pinned: bool `[held]`.
        keep: number of survivors, the pinned included.

    Returns:
        Bool `[held]`.
    """
    leaving = evict_order[~pinned[evict_order]][: len(pinned) - keep]
    survives = torch.ones_like(pinned)
    survives[leaving] = False
    assert int(survives.sum()) == keep
    return survives


def select_tokens(scores: Tensor, pinned: Tensor, keep: int) -> Tensor:
    """Survivors `[held]` by token score `[held]`; of equal tokens the later one leaves."""
    # Flipped, a stable ascending sort puts the later of two equal tokens first.
    order = len(scores) - 1 - scores.flip(0).sort(stable=True).indices
    return select(order, pinned, keep)


def select_sentences(scores: Tensor, pinned: Tensor, owner: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Survivors `[held]` by sentence, and each token's sentence score `[held]`, from token scores `[held]`."""
    by_sentence = torch.zeros_like(scores)
    for number in owner.unique().tolist():
        members = (owner == number) & ~pinned
        if members.any():
            by_sentence[members] = scores[members].mean()
    return select(by_sentence.sort(stable=True).indices, pinned, keep), by_sentence


def arbitrate(
    survives: Tensor, scores: Tensor, pinned: Tensor, engine: Tensor, where: str, tolerance: float = TIE_TOLERANCE
) -> int:
    """Check that a different selection of the engine differs by near ties only.

    Args:
        survives: bool `[held]`, the reference's choice.
        scores: `[held]` that it chose by.
        pinned: bool `[held]`.
        engine: bool `[held]`, the engine's choice, of the same number of tokens.
        where: for the message.
        tolerance: relative distance from the cut that is near.

    Returns:
        Survivors of the engine that the reference would have evicted.

    Raises:
        SelectionError: a differing token's score is not near the cut.
    """
    differs = survives != engine
    if not differs.any():
        return 0
    if (differs & pinned).any():
        raise SelectionError(f"{where}: the engine evicted a pinned token")
    cut = (scores[survives & ~pinned].min() + scores[~survives].max()) / 2
    distance = (scores[differs] - cut).abs() / torch.maximum(scores[differs].abs(), cut.abs())
    if float(distance.max()) > tolerance:
        raise SelectionError(
            f"{where}: {int(differs.sum()) // 2} survivors differ, up to {float(distance.max()):.1e} from the cut: "
            f"reference keeps {(survives & ~engine).nonzero().flatten().tolist()}, "
            f"engine keeps {(engine & ~survives).nonzero().flatten().tolist()} (indices into the held tokens)"
        )
    return int(differs.sum()) // 2


# ---- generation


class Request:
    """Greedy generation of one request with eviction; the reference decides itself when and how many."""

    tie_tolerance = TIE_TOLERANCE

    def __init__(self, model: Model, prompt: Sequence[int], settings: Settings, trace: EngineTrace | None) -> None:
        self._model = model
        self._settings = settings
        self._trace = trace
        self._num_prompt = len(prompt)
        self._text = list(prompt)
        self._cache = DynamicCache()
        self._num_computed = 0
        self._hidden = torch.empty(0)
        self._queries = torch.empty(0)
        self._positions = torch.empty(0, dtype=torch.int64)
        self._mass = torch.empty(0)
        self._errors, self._num_seen = torch.empty(0), torch.empty(0)
        # Queries count from the prompt's last one on, or from one buffer before the first compaction.
        first_bound = settings.bound(len(prompt), is_first=True)
        self._first_counted = min(len(prompt) - 1, first_bound - settings.buffer)
        self._log_betas = torch.empty(0)
        self._logits = torch.empty(0)
        self._result = Result([])
        self._by_segment = dict(settings.parameters) if settings.method == "thinkv" else None
        self._sparsities: list[float] = []
        self._steps: list[int] = []
        self._first = len(prompt) if settings.protect_prompt else 0
        if self._by_segment is not None:
            # Clusters of keys may come out differently in the last bits; the number of such tokens is still limited.
            self.tie_tolerance = float("inf")

    @torch.inference_mode()
    def run(self, num_new: int) -> Result:
        """Generate `num_new` tokens."""
        first = self._settings.bound(self._num_prompt, is_first=True)
        # Segments of an unprotected prompt begin with it, and their last queries are needed.
        piece = first if self._by_segment is None or self._first else self._by_segment["segment"]
        for start in range(0, min(first, self._num_prompt), piece):
            logits = self._feed(self._text[start : min(start + piece, first)])
        for token in self._text[first:]:
            self._compact_if_due()
            logits = self._feed([token])
        while True:
            token = self._choose(logits)
            self._result.tokens.append(token)
            self._result.logprobs.append(float(logits.log_softmax(-1)[token]))
            self._result.gaps.append(float(logits.max() - logits[token]))
            if len(self._result.tokens) == num_new:
                return self._result
            self._compact_if_due()
            self._text.append(token)
            logits = self._feed([token])

    def _choose(self, logits: Tensor) -> int:
        return int(logits.argmax())

    def _feed(self, token_ids: list[int]) -> Tensor:
        """Compute tokens and remember what eviction needs; logits of the last `[vocab]`."""
        added = None
        if self._settings.steering is not None:
            added = self._settings.steering.layer, self._steered(len(token_ids), self._settings.steering)
        logits, hidden, queries = self._model.forward(token_ids, self._num_computed, self._cache, added)
        new = torch.arange(self._num_computed, self._num_computed + len(token_ids))
        layers, heads = len(self._cache.layers), self._cache.layers[0].keys.shape[1]
        if self._num_computed == 0:
            self._hidden, self._queries = hidden, queries
            self._positions = new.expand(layers, heads, -1)
        else:
            self._hidden = torch.cat([self._hidden, hidden])
            self._queries = torch.cat([self._queries, queries], dim=2)
            self._positions = torch.cat([self._positions, new.expand(layers, heads, -1)], dim=2)
        self._queries = self._queries[:, :, -self._settings.window :]
        self._count_attention(new)
        if self._settings.method == "trimkv":
            said = self._model.log_betas()
            self._log_betas = said if self._num_computed == 0 else torch.cat([self._log_betas, said], dim=2)
        self._num_computed += len(token_ids)
        written = self._num_computed - self._first
        if self._by_segment is not None and written > 0 and written % self._by_segment["segment"] == 0:
            layers = [int(number) for number in self._by_segment["layers"].split(",")]
            heads = [(queries, keys) for queries, keys, (layer, _) in self._heads() if layer in layers]
            self._sparsities.append(sum(formulas.sparsity(*each) for each in heads) / len(heads))
        self._logits = logits
        return logits

    def _count_attention(self, new: Tensor) -> None:
        """Add what the queries at positions `new` attend to; a step computes one token or the prompt's beginning."""
        heads = self._cache.layers[0].keys.shape[1]
        weights = torch.cat([layer.self_attn.recorded_weights for layer in self._model.lm.model.layers])
        weights = weights[:, :, new >= self._first_counted].unflatten(1, (heads, -1))  # [layers, heads, G, rows, held]
        mass = weights.sum(dim=3).mean(dim=2)
        known = self._mass.shape[2] if self._mass.dim() == 3 else 0
        padding = (0, mass.shape[2] - known)
        self._mass = mass + (F.pad(self._mass, padding) if known else 0)
        if not self._settings.by_error:
            return
        errors = torch.zeros_like(mass)
        for i, layer in enumerate(self._cache.layers):
            for row in weights[i].unbind(dim=2):
                outputs = row @ layer.values[0]  # [heads, G, D]
                distance = (layer.values[0][:, None] - outputs[:, :, None]).square().sum(dim=-1)
                errors[i] += (row.square() * distance).mean(dim=1)
        rows = new[new >= self._first_counted]
        seen = (rows[:, None, None, None] >= self._positions).sum(dim=0).float()
        self._errors = errors + (F.pad(self._errors, padding) if known else 0)
        self._num_seen = seen + (F.pad(self._num_seen, padding) if known else 0)

    def _heads(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """Of every layer and kv head: the last queries `[W, group, D]`, the held keys `[held, D]` and which it is."""
        for i, layer in enumerate(self._cache.layers):
            queries = self._queries[i].unflatten(0, (layer.keys.shape[1], -1)).transpose(1, 2)
            for head in range(len(queries)):
                yield queries[head], layer.keys[0, head], (i, head)

    def _steered(self, num_new: int, steering: Steering) -> Tensor:
        """What steering adds to the newest tokens, `[new, hidden]`."""
        for position in range(self._num_computed, self._num_computed + num_new):
            self._result.alphas.append(alpha_at(self._model, self._text, self._num_prompt, position, steering))
        return torch.tensor(self._result.alphas[-num_new:])[:, None] * steering.vector

    def _compact_if_due(self) -> None:
        num_resident = self._positions.shape[2]
        keep = self._settings.keep(self._num_prompt)
        is_at_bound = num_resident >= self._settings.bound(self._num_prompt, is_first=not self._result.events)
        if not is_at_bound and not self._settings.ends_prompt(self._num_prompt, self._num_computed, num_resident):
            return
        survives = self._arbitrated(*self._select(self._token_scores(), keep), keep)
        self._cache = self._held_by(survives)
        shape = (*survives.shape[:2], keep)
        self._positions = self._positions[survives].view(shape)
        self._mass = self._mass[survives].view(shape)
        if self._settings.by_error:
            left = DECAY ** (self._settings.buffer / 128)
            self._errors, self._num_seen = (left * x[survives].view(shape) for x in (self._errors, self._num_seen))
        if self._settings.method == "trimkv":
            self._log_betas = self._log_betas[survives].view(shape)
        self._result.events.append(Event(self._num_computed, num_resident, self._positions.clone()))

    def _held_by(self, survives: Tensor) -> DynamicCache:
        """A cache of the tokens `[layers, heads, held]`, as many of each head."""
        cache = DynamicCache()
        for i, (layer, mask) in enumerate(zip(self._cache.layers, survives, strict=True)):
            index = torch.stack([row.nonzero().flatten() for row in mask])[None, :, :, None]
            index = index.expand(-1, -1, -1, layer.keys.shape[3])
            cache.update(layer.keys.gather(2, index), layer.values.gather(2, index), i)
        return cache

    def _pinned(self) -> Tensor:
        """Tokens that always stay, bool `[layers, heads, held]`."""
        first = self._num_prompt if self._settings.protect_prompt else 0
        first = max(first, NUM_SINKS.get(self._settings.method, 0))
        pinned = (self._positions < first) | (self._positions >= self._num_computed - self._settings.window)
        if self._settings.method == "finch":
            task = self._num_prompt - self._settings.num_question
            pinned |= (self._positions >= task) & (self._positions < self._num_prompt)
        return pinned

    def _lookahead(self) -> Tensor:
        """Post-RoPE queries `[layers, Hq, n, D]` of a draft answer, decoded on a cache that SnapKV has compacted."""
        survives, _ = self._select(self._snapkv_scores(), self._settings.keep(self._num_prompt))
        cache, logits, found = self._held_by(survives), self._logits, []
        for i in range(self._settings.lookahead):
            logits, _, queries = self._model.forward([int(logits.argmax())], self._num_computed + i, cache)
            found.append(queries)
        return torch.cat(found, dim=2)

    def _sentences(self) -> tuple[list[Sentence], int]:
        first = self._num_prompt if self._settings.protect_prompt else 0
        return split_sentences(self._text[: self._num_computed], first, self._model.delimiters)

    def _token_scores(self) -> Tensor:
        """Score of each held token, `[layers, heads, held]`."""
        if self._settings.method == "streaming_llm":
            return self._positions.float()
        if self._settings.method == "random":
            return random_scores(self._positions, self._num_computed)
        if self._settings.method == "h2o":
            recent = int(H2O_RECENT_SHARE * self._settings.keep(self._num_prompt))
            is_recent = self._positions >= self._num_computed - recent
            # For single tokens any number above the masses will do; a small one leaves near ties near.
            above = 1e6 if self._settings.granularity == "sentence" else float(self._mass.max()) + 1
            return torch.where(is_recent, self._positions + above, self._mass)
        if self._by_segment is not None:
            return self._segment_scores(**self._by_segment)
        if self._settings.method == "snapkv":
            return self._snapkv_scores()
        if self._settings.method == "trimkv":
            both = zip(self._log_betas.flatten(0, 1).tolist(), self._positions.flatten(0, 1).tolist(), strict=True)
            scores = torch.tensor([formulas.trimkv(*row) for row in both])
            return scores.view(self._positions.shape)
        if self._settings.method == "finch":
            return self._finch_scores()
        if self._settings.method == "laq":
            return self._laq_scores()
        if self._settings.by_error:
            return self._error_scores()
        if self._settings.method not in ("rkv", "skipkv"):
            return self._published_scores()
        scores = torch.stack(
            [rkv_scores(q, layer.keys[0]) for q, layer in zip(self._queries, self._cache.layers, strict=True)]
        )
        if self._settings.method == "skipkv":
            sentences, _ = self._sentences()
            penalties = torch.zeros(self._num_computed)
            for sentence, penalty in zip(sentences, sentence_penalties(sentences, self._hidden), strict=True):
                penalties[sentence.start : sentence.end] = penalty
            scores = scores - penalties[self._positions]
        return scores

    def _error_scores(self) -> Tensor:
        protected = self._num_prompt if self._settings.protect_prompt else 0
        recent = formulas.num_recent(self._settings.keep(self._num_prompt), protected)
        is_recent = self._positions >= self._num_computed - recent
        free = ~self._pinned()
        sentences, _ = self._sentences()
        share = torch.zeros(self._num_computed)
        said_again = repeated_shares(self._text[: self._num_computed], self._first, sentences)
        for sentence, repeated in zip(sentences, said_again, strict=True):
            share[sentence.start : sentence.end] = repeated
        scores = torch.zeros(self._positions.shape)
        for _, keys, place in self._heads():
            chosen = free[place]
            error = self._errors[place] / self._num_seen[place].clamp(min=1)
            worth = error.clamp(min=max(1e-6 * float(error[chosen].mean()), 1e-37)).log()
            unit = F.normalize(keys, dim=-1)
            alike = F.cosine_similarity(unit, unit.mean(dim=0, keepdim=True), dim=-1)
            novelty = (1 - share[self._positions[place]] ** formulas.POWER).clamp(min=0.05).log()
            worth, alike = (
                (x - x[chosen].mean()) / x[chosen].std(correction=0).clamp(min=1e-8) for x in (worth, alike)
            )
            scores[place] = worth - formulas.KEY_WEIGHT * alike + formulas.SENTENCE_WEIGHT * novelty
        return scores + formulas.RECENT_WEIGHT * is_recent

    def _snapkv_scores(self) -> Tensor:
        return torch.stack(
            [snapkv_scores(q, layer.keys[0]) for q, layer in zip(self._queries, self._cache.layers, strict=True)]
        )

    def _finch_scores(self) -> Tensor:
        scores, in_prompt = torch.zeros(self._positions.shape), self._num_computed <= self._num_prompt
        cache, asking = self._cache, self._queries
        if self._settings.ask_chunks and self._num_computed < self._num_prompt:
            # The same cache with the question behind it.
            cache = self._held_by(torch.ones(self._positions.shape, dtype=torch.bool))
            question = self._text[self._num_prompt - self._settings.num_question : self._num_prompt]
            _, _, asking = self._model.forward(question, self._num_computed, cache)
        for i, layer in enumerate(cache.layers):
            queries = asking[i].unflatten(0, (layer.keys.shape[1], -1)).transpose(1, 2)  # [heads, W, group, D]
            queries = queries[:, -self._settings.num_question :] if in_prompt else queries
            for head in range(len(queries)):
                found = formulas.finch(queries[head], layer.keys[0, head])
                scores[i, head] = torch.tensor(found[: scores.shape[2]])
        return scores

    def _laq_scores(self) -> Tensor:
        window = self._settings.window
        if self._num_computed != self._num_prompt or not self._settings.lookahead:
            return self._snapkv_scores()
        scores, ahead = torch.zeros(self._positions.shape), self._lookahead()
        for i, layer in enumerate(self._cache.layers):
            heads = layer.keys.shape[1]
            drafted, last = (q[i].unflatten(0, (heads, -1)).transpose(1, 2) for q in (ahead, self._queries))
            for head in range(heads):
                asking = last[head] if self._settings.with_window else last[head, :0]
                scores[i, head] = torch.tensor(formulas.laq(drafted[head], asking, layer.keys[0, head], window))
        return scores

    def _published_scores(self) -> Tensor:
        scores = torch.zeros(self._positions.shape)
        for queries, keys, (layer, head) in self._heads():
            held = queries, keys, self._cache.layers[layer].values[0, head], self._mass[layer, head]
            scores[layer, head] = torch.tensor(formulas.score(self._settings.method, {}, *held))
        return scores

    def _segment_scores(self, segment: int, transition_above: float, execution_below: float, **_: Any) -> Tensor:
        first, end = self._first, self._num_computed - self._settings.window
        sizes = [min(segment, end - start) for start in range(first, end, segment)]
        num_free = self._settings.keep(self._num_prompt) - first - self._settings.window
        bounds = transition_above, execution_below
        self._result.sparsities = self._sparsities
        quota, order, self._steps = formulas.quotas(self._sparsities, self._steps, sizes, num_free, *bounds)
        scores = torch.zeros(self._positions.shape)
        for _, keys, place in self._heads():
            held = self._positions[place].tolist()
            numbers = [(position - first) // segment if first <= position < end else None for position in held]
            scores[place] = torch.tensor(formulas.thinkv(keys, numbers, quota, order))
        return scores

    def _select(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The reference's own survivors and the scores it chose by, both `[layers, heads, held]`, by token scores."""
        pinned = self._pinned()
        survives = torch.zeros_like(pinned)
        if self._settings.granularity == "head":
            for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
                survives[tuple(index)] = select_tokens(scores[tuple(index)], pinned[tuple(index)], keep)
            return survives, scores
        owner = sentence_of_token(self._positions[0, 0], *self._sentences())
        common, by_sentence = select_sentences(scores.mean(dim=(0, 1)), pinned[0, 0], owner, keep)
        return common.expand_as(survives), by_sentence.expand_as(scores)

    def _arbitrated(self, survives: Tensor, scores: Tensor, keep: int) -> Tensor:
        """`survives` with near ties decided the engine's way, counted."""
        layers, heads, _ = survives.shape
        per_head = self._settings.granularity == "head"
        self._result.num_selected += keep * (layers * heads if per_head else 1)
        index = len(self._result.events)
        if self._trace is None or index >= len(self._trace.kept):
            return survives
        where = f"compaction {index} at {self._num_computed} tokens"
        kept = self._trace.kept[index].long()
        if int(self._trace.logical_length[index]) != self._num_computed or kept.shape != (layers, heads, keep):
            raise SelectionError(
                f"{where} to {keep}: the engine compacted at {int(self._trace.logical_length[index])} "
                f"to {tuple(kept.shape)}"
            )
        engine = torch.zeros(layers, heads, self._num_computed, dtype=torch.bool).scatter(2, kept, True)
        engine = engine.gather(2, self._positions)
        if not (engine.sum(-1) == keep).all():
            raise SelectionError(f"{where}: the engine kept tokens that it had evicted before")
        if not per_head and not (engine == engine[0, 0]).all():
            raise SelectionError(f"{where}: the engine's layers or heads kept different tokens")
        pinned = self._pinned()
        for layer in range(layers if per_head else 1):
            for head in range(heads if per_head else 1):
                one = (layer, head)
                self._result.num_ties += arbitrate(
                    *(survives[one], scores[one], pinned[one], engine[one], f"{where}, layer {layer}, head {head}"),
                    self.tie_tolerance,
                )
        return engine


def generate(
    model: Model, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace | None = None
) -> Result:
    """Generate greedily with eviction.

    Args:
        model: the model.
        prompt: token ids.
        num_new: tokens to generate, whatever the model says about ending.
        settings: method and limits.
        trace: the engine's trace of the same request. Its only use is to decide near ties.

    Raises:
        SelectionError: the engine's choice differs from the reference's by more than a near tie.
    """
    return Request(model, prompt, settings, trace).run(num_new)


class Replay(Request):
    """Follows an engine that rounds more than float32 does: takes its tokens and survivors, and says how far off."""

    tie_tolerance = float("inf")

    def __init__(
        self, model: Model, prompt: Sequence[int], settings: Settings, trace: EngineTrace, tokens: Sequence[int]
    ) -> None:
        super().__init__(model, prompt, settings, trace)
        self._tokens = tokens

    def _choose(self, logits: Tensor) -> int:
        return self._tokens[len(self._result.tokens)]


class Replays:
    """In place of a `ReferenceCache`: replays of what an engine did.

    Args:
        model: the reference's.
        tokens: by prompt and settings, what the engine wrote.
    """

    def __init__(self, model: Model, tokens: dict[tuple[tuple[int, ...], Settings], list[int]]) -> None:
        self.model = model
        self._tokens = tokens

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """What the reference thinks of the engine's answer."""
        return Replay(self.model, prompt, settings, trace, self._tokens[tuple(prompt), settings]).run(num_new)


class ReferenceCache:
    """References that several engines are compared with, computed once where no tie asks for more."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._results: dict[tuple, Result] = {}

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """`generate`, or an earlier result with the same survivors as the trace."""
        key = (tuple(prompt), num_new, settings)
        known = self._results.get(key)
        if known is None or not _same_survivors(known, trace):
            self._results[key] = known = generate(self.model, prompt, num_new, settings, trace)
        return known


def _same_survivors(result: Result, trace: EngineTrace) -> bool:
    return len(result.events) == len(trace.kept) and all(
        torch.equal(event.kept, kept.long()) for event, kept in zip(result.events, trace.kept, strict=True)
    )
