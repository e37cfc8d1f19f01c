"""Memory of a request's KV and of what the policy keeps beside it: arithmetic on shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import KVPolicyConfig
from ..core.limits import NO_OTHERS, STORED_PAGE, DraftSlots, OtherGroups
from ..core.needs import Need

ENTRY_BYTES = 4
"""Bytes per sidecar entry."""


def sidecars(needs: Need) -> list[str]:
    """Name what is kept beside the KV of each token, layer and kv head: its position, and inputs of policies."""
    optional = {
        Need.ATTENTION_MASS: ["attention"],
        Need.OUTPUT_ERROR: ["output error", "query count"],
        Need.GATES: ["gate"],
    }
    return ["position", *(name for need, names in optional.items() if need & needs for name in names)]


@dataclass(frozen=True)
class Pool:
    """The blocks and the limits of an engine.

    Attributes:
        num_blocks: KV blocks with the policy, that requests can use.
        block_size: tokens per block of the group that is compacted.
        max_num_seqs: most requests that run at once.
        max_length: longest request, prompt and output.
        max_tokens: most tokens of a step.
        others: groups of the KV cache that are not compacted; they take blocks from the same pool.
        num_draft_slots: slots that drafts of speculative decoding may take beyond the tokens of a request.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_length: int
    max_tokens: int
    others: OtherGroups = NO_OTHERS
    num_draft_slots: int = 0

    @property
    def draft_slots(self) -> DraftSlots:
        """Slots for drafts."""
        return DraftSlots(self.num_draft_slots, self.max_length)


@dataclass(frozen=True)
class ModelShape:
    """The part of a model that one rank holds: the layers of its pipeline stage, and its share of the heads.

    Attributes:
        num_layers: layers with full attention, whose KV is compacted.
        num_heads: query heads.
        num_kv_heads: kv heads.
        head_size: elements of a key.
        hidden_size: elements of a hidden state (never split over ranks).
        vocab_size: number of token ids.
        element_size: bytes per element of a query and of a hidden state.
        kv_element_size: bytes per element of KV, if different.
        num_pooled_layers: layers whose KV a block of the pool has room for, if more than `num_layers`.
        query_size: elements of a query of a model with latents (MLA), whose keys contain their values; None for others.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    element_size: int
    kv_element_size: int | None = None
    num_pooled_layers: int | None = None
    query_size: int | None = None

    @property
    def _vector_bytes(self) -> int:
        """Bytes of a token's keys, or values, in one layer."""
        size = self.element_size if self.kv_element_size is None else self.kv_element_size
        return self.num_kv_heads * self.head_size * size

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV per token in a block of the pool."""
        vectors = 2 if self.query_size is None else 1
        return vectors * (self.num_pooled_layers or self.num_layers) * self._vector_bytes

    def sidecar_bytes(self, needs: Need) -> int:
        """Bytes per token of the cache on top of its KV: an entry for each of `sidecars`.

        vLLM's profiling does not see them, as they are allocated with the cache. Requests that share many blocks may
        need more sums over queries, which then grow.
        """
        return ENTRY_BYTES * self.num_layers * self.num_kv_heads * len(sidecars(needs))

    def left_for_kv(self, amount: int, needs: Need) -> int:
        """Return the part of an amount of memory, in any unit, that remains for KV after the sidecars."""
        return amount * self.kv_bytes // (self.kv_bytes + self.sidecar_bytes(needs))

    def ring_bytes(self, num_kept: int, num_rows: int, max_tokens: int) -> int:
        """Bytes of the ring of queries, with the index of a step of `max_tokens`; see `worker.signals.queries`."""
        elements = (num_rows * num_kept + 1) * self.num_layers * self.num_heads * (self.query_size or self.head_size)
        return elements * self.element_size + 8 * max_tokens

    def tracker_bytes(self, config: KVPolicyConfig, num_rows: int, max_length: int) -> int:
        """Bytes of sentence ends, penalties, embeddings and text of all rows; see `worker.signals.sentences`."""
        hidden = self.hidden_size if config.needs & Need.HIDDEN else 0
        kept = config.policy.sentence_options.max_sentences if hidden else 0
        text = 4 * (max_length + 1) if config.needs & Need.RECURRENCE else 0
        row = text + 8 * (max_length + 1) + 3 * 8 + 1 + 4 + 4 * hidden + (kept + 1) * hidden * self.element_size
        return num_rows * row + self.vocab_size + 8 * kept

    def gate_bytes(self, width: int, max_tokens: int) -> int:
        """Bytes of gates with `width` hidden units, and of their outputs in a step; see `worker.signals.gates`."""
        first, second = width * (self.hidden_size + 1), self.num_kv_heads * (width + 1)
        return self.num_layers * (first * self.element_size + 4 * (second + max_tokens * self.num_kv_heads))

    def row_bytes(self, config: KVPolicyConfig, num_rows: int, pool: Pool) -> int:
        """Bytes of the queries and sentences of `num_rows` requests.

        Sentences only exist on the last pipeline stage, which this counts.
        """
        ring = self.ring_bytes(config.num_queries, num_rows, pool.max_tokens) if config.needs & Need.QUERIES else 0
        ring += num_rows * self.recall_bytes(config)
        return ring + (self.tracker_bytes(config, num_rows, pool.max_length) if config.needs & Need.SENTENCES else 0)

    def stored_pages(self, config: KVPolicyConfig, num_layers: int, num_ranks: int) -> int:
        """Pages of evicted tokens that the host memory of an engine holds; at least one.

        Args:
            config: the policy.
            num_layers: layers whose tokens are stored, of all stages of a pipeline together.
            num_ranks: tensor-parallel ranks.
        """
        page = STORED_PAGE * 2 * num_layers * num_ranks * self._vector_bytes
        return max(1, int(config.kv_recall_memory * 2**30) // page)

    def recall_bytes(self, config: KVPolicyConfig) -> int:
        """Bytes of a request on the device for tokens that come back.

        Two vectors a head, and for each slot that they may take its number, and what is known of its owner.
        """
        if not config.recalls:
            return 0
        most = int(config.kv_recall_share * config.kv_budget)
        entries = 2 * self.head_size + most * (2 + len(sidecars(config.needs)))
        return self.num_layers * self.num_kv_heads * ENTRY_BYTES * entries

    def sketch_bytes(self, num_pages: int) -> int:
        """Bytes on the device that sketch the keys of so many stored pages: a bit for each element, and a size."""
        return num_pages * STORED_PAGE * self.num_layers * self.num_kv_heads * (self.head_size // 8 + ENTRY_BYTES)

    def state_bytes(self, config: KVPolicyConfig, num_rows: int, pool: Pool) -> int:
        """Bytes that the policy allocates beside the cache: queries and sentences of `num_rows` requests, and gates.

        Steering is left out: its buffers are smaller than a block, depend on the tokenizer, and exist with and without
        eviction.
        """
        gates = 0 if config.gates is None else self.gate_bytes(config.gates.width, pool.max_tokens)
        return self.row_bytes(config, num_rows, pool) + gates
