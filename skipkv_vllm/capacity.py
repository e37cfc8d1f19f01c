"""What a request's KV costs and how many requests fit, with and without eviction: arithmetic on shapes.

The banner, `skipkv plan` and the worker that takes the memory all count with these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import KVPolicyConfig, RequestOptions
from .core.limits import Demand, ceil_div, most_tokens
from .core.needs import Need
from .scheduler.admission import limits_of

POSITION_BYTES = 4
"""Of an entry of the position sidecar, and of any other."""


def sidecars(needs: Need) -> list[str]:
    """What is kept beside the KV of each token, layer and kv head: its position, and what policies ask for."""
    optional = {
        Need.ATTENTION_MASS: ["attention"],
        Need.OUTPUT_ERROR: ["output error", "query count"],
        Need.GATES: ["gate"],
    }
    return ["position", *(name for need, names in optional.items() if need & needs for name in names)]


@dataclass(frozen=True)
class ModelShape:
    """A model as one rank holds it: of a pipeline a stage's layers, of tensor parallelism a share of the heads.

    Attributes:
        num_layers: attention layers.
        num_heads: query heads.
        num_kv_heads: kv heads.
        head_size: elements of a key.
        hidden_size: elements of a hidden state (never split over ranks).
        vocab_size: token ids.
        element_size: bytes of an element of a query and of a hidden state.
        kv_element_size: of KV, where that differs.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    element_size: int
    kv_element_size: int | None = None

    @property
    def kv_bytes(self) -> int:
        """KV of one token."""
        size = self.element_size if self.kv_element_size is None else self.kv_element_size
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * size

    def sidecar_bytes(self, needs: Need) -> int:
        """What a token of the cache costs on top of its KV: an entry each for what `sidecars` names. vLLM's profiling
        does not see them: sums over queries grow with their requests, the others come with the cache."""
        return POSITION_BYTES * self.num_layers * self.num_kv_heads * len(sidecars(needs))

    def left_for_kv(self, amount: int, needs: Need) -> int:
        """Of an amount of memory, in any unit, what remains for KV beside the sidecar."""
        return amount * self.kv_bytes // (self.kv_bytes + self.sidecar_bytes(needs))

    def ring_bytes(self, num_kept: int, num_slots: int, max_tokens: int) -> int:
        """The ring of observation queries, with the index of a step of `max_tokens`; see `worker.queries`."""
        rows = (num_slots * num_kept + 1) * self.num_layers * self.num_heads * self.head_size
        return rows * self.element_size + 8 * max_tokens

    def tracker_bytes(self, config: KVPolicyConfig, num_slots: int, max_length: int) -> int:
        """Sentence ends, penalties, embeddings and text of all slots; see `sentences.tracker`."""
        hidden = self.hidden_size if config.needs & Need.HIDDEN else 0
        kept = config.policy.sentence_options.max_sentences if hidden else 0
        text = 4 * (max_length + 1) if config.needs & Need.RECURRENCE else 0
        slot = text + 8 * (max_length + 1) + 3 * 8 + 1 + 4 + 4 * hidden + (kept + 1) * hidden * self.element_size
        return num_slots * slot + self.vocab_size + 8 * kept

    def gate_bytes(self, width: int, max_tokens: int) -> int:
        """Learned gates with `width` hidden units, and what they say of a step of `max_tokens`; see `worker.gates`."""
        first, second = width * (self.hidden_size + 1), self.num_kv_heads * (width + 1)
        return self.num_layers * (first * self.element_size + 4 * (second + max_tokens * self.num_kv_heads))

    def state_bytes(self, config: KVPolicyConfig, num_slots: int, max_length: int, max_tokens: int) -> int:
        """All that the policy holds beside the cache, whatever runs: queries and sentences of `num_slots` requests, and
        learned gates.

        Of a pipeline the last stage, which alone has the sentences. Steering is left out: its buffers are smaller than
        a page, depend on the tokenizer, and are there with and without eviction.
        """
        ring = self.ring_bytes(config.num_queries, num_slots, max_tokens) if config.needs & Need.QUERIES else 0
        tracker = self.tracker_bytes(config, num_slots, max_length) if config.needs & Need.SENTENCES else 0
        return ring + tracker + (0 if config.gates is None else self.gate_bytes(config.gates.width, max_tokens))


@dataclass(frozen=True)
class Pool:
    """The pages of one engine, and how it is to be used.

    Attributes:
        num_pages: KV pages with the policy on.
        page_size: tokens of a page.
        max_num_seqs: requests that may run at once.
        max_length: longest request, prompt and output.
        max_tokens: tokens of a step.
    """

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_length: int
    max_tokens: int


@dataclass(frozen=True)
class Capacity:
    """What fits into a pool.

    Attributes:
        kv_bytes: KV of a token.
        sidecar_bytes: what the policy adds to it.
        sidecars: what that is, see `sidecars`.
        state_bytes: queries, sentences and gates, by request.
        page_size: tokens of a page.
        pages: pages with the policy.
        pages_full: pages that the same memory would hold without it.
        bound: tokens that a request of this prompt holds at most once it decodes.
        request_pages: pages that it holds at most, with those of tokens computed ahead.
        request_pages_full: pages that a request of this length holds at its end without the policy.
        length: that length.
        fit: requests at their bound that the pages hold.
        fit_full: the same without the policy, at their full length.
        concurrency: requests that run at once with the policy: those that fit, at most `max_num_seqs`.
        concurrency_full: the same without it.
        break_even: shortest length from which a request costs less memory with the policy than without; a request
            that stays shorter pays for its state and saves nothing.
        is_capped: whether `max_num_seqs`, and not memory, limits the concurrency with the policy.
    """

    kv_bytes: int
    sidecar_bytes: int
    sidecars: list[str]
    state_bytes: int
    page_size: int
    pages: int
    pages_full: int
    bound: int
    request_pages: int
    request_pages_full: int
    length: int
    fit: int
    fit_full: int
    concurrency: int
    concurrency_full: int
    break_even: int
    is_capped: bool

    @property
    def request_bytes(self) -> int:
        """Most memory that a request takes with the policy, sidecar and state included."""
        return self.request_pages * self.page_size * (self.kv_bytes + self.sidecar_bytes) + self.state_bytes

    @property
    def request_bytes_full(self) -> int:
        """The same without it, at the request's end."""
        return self.request_pages_full * self.page_size * self.kv_bytes

    @property
    def state(self) -> str:
        """What `state_bytes` are of."""
        return "queries, sentences and gates" if "gate" in self.sidecars else "queries and sentences"

    def lines(self) -> list[str]:
        """For the banner and `skipkv plan`."""
        fits = f"{self.fit:,} such requests fit at once instead of {self.fit_full:,}"
        if self.is_capped:
            fits += f"; max_num_seqs lets {self.concurrency:,} run instead of {self.concurrency_full:,}"
        *others, last = self.sidecars
        beside = f"{', '.join(others)} and {last}" if others else last
        return [
            f"{self.kv_bytes:,} bytes of KV a token + {self.sidecar_bytes:,} for its {beside}, "
            f"{self.state_bytes / 2**20:.2f} MiB of {self.state} a request",
            f"{self.pages:,} pages of {self.page_size} tokens; the same memory without a policy: {self.pages_full:,}",
            f"a request of {self.length:,} tokens holds at most {self.request_pages:,} pages instead of "
            f"{self.request_pages_full:,}",
            fits,
            f"break-even at {self.break_even:,} tokens (prompt and output): shorter requests hold more memory with "
            "the policy than without",
        ]


def capacity(
    config: KVPolicyConfig, shape: ModelShape, pool: Pool, *, length: int | None = None, prompt: int = 0
) -> Capacity:
    """How many requests fit.

    Args:
        config: an active policy.
        shape: of one rank.
        pool: of the engine.
        length: tokens of a request at its end; the longest allowed by default.
        prompt: its prompt, which raises its bound where it is protected and exceeds the budget; where it is not, it may
            be held whole at first, or take pages for tokens that are computed ahead.
    """
    length = pool.max_length if length is None else length
    limits = limits_of(RequestOptions.parse(None, config, length), config, prompt)
    assert limits is not None, "capacity is asked for of a policy that evicts"
    kv, sidecar, page = shape.kv_bytes, shape.sidecar_bytes(config.needs), pool.page_size
    state = shape.state_bytes(config, pool.max_num_seqs, pool.max_length, pool.max_tokens)
    state_of_one = ceil_div(state, pool.max_num_seqs)
    pages_full = (pool.num_pages * page * (kv + sidecar) + state) // (page * kv)
    request_pages = Demand(most_tokens(limits, length), 0, limits.lookahead).num_blocks(page)
    request_pages_full = ceil_div(length, page)
    fit, fit_full = pool.num_pages // request_pages, pages_full // request_pages_full
    bytes_of_one = ceil_div(limits.bound, page) * page * (kv + sidecar) + state_of_one
    return Capacity(
        kv_bytes=kv,
        sidecar_bytes=sidecar,
        sidecars=sidecars(config.needs),
        state_bytes=state_of_one,
        page_size=page,
        pages=pool.num_pages,
        pages_full=pages_full,
        bound=limits.bound,
        request_pages=request_pages,
        request_pages_full=request_pages_full,
        length=length,
        fit=fit,
        fit_full=fit_full,
        concurrency=min(fit, pool.max_num_seqs),
        concurrency_full=min(fit_full, pool.max_num_seqs),
        break_even=bytes_of_one // (page * kv) * page + 1,
        is_capped=fit > pool.max_num_seqs,
    )


def pages_with_policy(
    config: KVPolicyConfig,
    shape: ModelShape,
    memory: int,
    *,
    page_size: int,
    max_num_seqs: int,
    max_length: int,
    max_tokens: int,
) -> int:
    """KV pages that remain of `memory` bytes, of which the policy's state and sidecar are taken; may be negative."""
    state = shape.state_bytes(config, max_num_seqs, max_length, max_tokens)
    # In the order of `worker.build.without_sidecar`: vLLM divides what that leaves into pages.
    return shape.left_for_kv(memory - state, config.needs) // (page_size * shape.kv_bytes)


def shape_of(
    text_config: Any, *, ranks: int, element_size: int, stages: int = 1, kv_element_size: int | None = None
) -> ModelShape:
    """A model's shape from its Hugging Face configuration.

    Args:
        text_config: `transformers` configuration of the language model.
        ranks: tensor-parallel ranks; kv heads that are fewer are repeated, as vLLM does it.
        element_size: bytes of an element of a weight.
        stages: of a pipeline; the one with most layers is described.
        kv_element_size: bytes of an element of KV, where that differs.
    """
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return ModelShape(
        num_layers=ceil_div(text_config.num_hidden_layers, stages),
        num_heads=heads // ranks,
        num_kv_heads=max(1, kv_heads // ranks),
        head_size=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        element_size=element_size,
        kv_element_size=kv_element_size,
    )


def as_dict(found: Capacity) -> Mapping[str, int | bool | list[str]]:
    """For JSON."""
    return dict(vars(found))
