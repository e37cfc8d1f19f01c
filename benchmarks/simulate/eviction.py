"""What eviction adds to the steps of an engine, by arithmetic on the shapes of its operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from skipkv_vllm.capacity import ModelShape
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, NUM_ACCUMULATED, Need
from skipkv_vllm.policies.rkv import RKV
from skipkv_vllm.policies.skipkv import SkipKV

from .gpus import GPU, Efficiency

RULES = {
    "redundancy": "compares each key with later ones until it finds a similar one (`score_tokens`)",
    "error": "measures what each query's output would be without each token (`measure_attention`)",
    "attention": "measures the attention of each query to each token (`measure_attention`)",
    "keys": "reads keys and values once, in a few operations for all layers",
}
"""How a method scores tokens, which decides what a compaction costs; "it ..."."""

WITHIN = 128
"""Later keys among which a similar one is found, if keys are similar: two tiles of the search."""

RANKS = 128
"""Keys of a block of the search, which compares each of them with all others of the block."""

OPERATIONS = 25
"""Operations of PyTorch in which a method scores or ranks the tokens of all layers, about."""


@dataclass(frozen=True)
class Eviction:
    """What a policy does, as far as its cost goes.

    Attributes:
        method: the policy's name.
        bound: tokens that a request holds before a compaction.
        buffer: tokens that a compaction frees.
        rule: a key of `RULES`.
        keys: "distinct", the worst case of the rule "redundancy", or "similar".
        records: whether every step records queries.
        tracks: what a step keeps of sentences: "words", "embeddings", or "" for nothing.
    """

    method: str
    bound: int
    buffer: int
    rule: str
    keys: str = "distinct"
    records: bool = True
    tracks: str = ""

    @classmethod
    def of(cls, config: KVPolicyConfig, bound: int, keys: str) -> Eviction:
        """Describe a server's policy."""
        policy, needs = config.policy, config.needs
        if isinstance(policy, RKV) or (isinstance(policy, SkipKV) and policy.compat != "default"):
            rule = "redundancy"
        elif needs & ACCUMULATED:
            rule = "error" if needs & Need.OUTPUT_ERROR else "attention"
        else:
            rule = "keys"
        tracks = "embeddings" if needs & Need.HIDDEN else "words" if needs & Need.SENTENCES else ""
        records = bool(needs & Need.QUERIES)
        return cls(config.kv_policy, bound, config.kv_buffer, rule, keys, records, tracks)


class EvictionCost(NamedTuple):
    """Seconds on one rank.

    Attributes:
        per_compaction: of one request, with the sums over queries since the last one.
        fixed: of a step, for the operators that every step has.
        per_request: of the same operators, for each request.
    """

    per_compaction: float = 0.0
    fixed: float = 0.0
    per_request: float = 0.0


def assumed_cost(gpu: GPU, shape: ModelShape, eviction: Eviction, efficiency: Efficiency) -> EvictionCost:
    """Compute the cost on a GPU on which the operators were not timed.

    Args:
        gpu: of the rank.
        shape: of the rank.
        eviction: what is done.
        efficiency: what is reached of the GPU's figures.
    """
    memory = gpu.bandwidth * efficiency.attention
    rows, bound = shape.num_layers * shape.num_kv_heads, eviction.bound
    # Tokens move, and positions and scores are written and read.
    moved = 2 * eviction.buffer * shape.kv_bytes + 24 * rows * bound
    seconds = _scoring(gpu, shape, eviction, efficiency) + moved / memory + 4 * efficiency.launch
    recorded = 2 * shape.num_layers * shape.num_heads * shape.head_size * shape.element_size if eviction.records else 0
    launches = 4 + (shape.num_layers if eviction.records else 0) + (6 if eviction.tracks else 0)
    return EvictionCost(efficiency.compaction * seconds, launches * efficiency.launch, recorded / memory)


def _scoring(gpu: GPU, shape: ModelShape, eviction: Eviction, efficiency: Efficiency) -> float:
    """Seconds of the scores of one compaction."""
    memory = gpu.bandwidth * efficiency.attention
    bound, dim = eviction.bound, shape.head_size
    keys = bound * shape.kv_bytes / 2  # and as many bytes of values
    if eviction.rule == "redundancy":
        # A pair of two blocks is compared once, for both of its keys.
        others = (bound + RANKS) / 2 if eviction.keys == "distinct" else WITHIN
        pairs = shape.num_layers * shape.num_kv_heads * bound * others
        return 2 * dim * pairs / (gpu.flops * efficiency.search) + 4 * keys / memory + 10 * efficiency.launch
    if eviction.rule in ("error", "attention"):
        by_error = eviction.rule == "error"
        # Logits twice; with errors the outputs, and their products with the values, in two parts each.
        products = (6 if by_error else 2) * shape.num_layers * shape.num_heads * NUM_ACCUMULATED * bound
        reached = gpu.flops * (efficiency.errors if by_error else efficiency.sums)
        reading = 2 * dim * products / reached + (4 if by_error else 2) * keys / memory
        ranking = OPERATIONS * efficiency.eager
        return eviction.buffer / NUM_ACCUMULATED * (reading + 8 * efficiency.launch) + ranking
    return 2 * keys / memory + OPERATIONS * efficiency.eager
