"""What a policy asks the workers to collect."""

from __future__ import annotations

from enum import Flag, auto


class Need(Flag):
    """An input of policies. The workers collect only the needs of a server's policies."""

    NOTHING = 0
    QUERIES = auto()
    """the last W post-RoPE queries of every layer"""
    KEYS = auto()
    """the held keys, gathered in positional order"""
    VALUES = auto()
    """the held values, gathered in positional order"""
    SENTENCES = auto()
    """sentence boundaries, from token ids"""
    HIDDEN = auto()
    """sentence embeddings and the penalties of repeated sentences, from last hidden states"""
    RECURRENCE = auto()
    """share of each sentence that later text repeats, from token ids"""
    ATTENTION_MASS = auto()
    """attention that each held token has received so far; needs keys and queries"""
    OUTPUT_ERROR = auto()
    """mean change in recent outputs if a held token were left out; needs keys, values and queries; excludes
    `ATTENTION_MASS`"""
    SEGMENTS = auto()
    """sparsity of attention at the end of each segment of the text, and a number that the method keeps of each;
    excludes `ATTENTION_MASS`"""
    GATES = auto()
    """output of learned gates for each held token, computed when it was written; see `Policy.gates_file`"""
    LOOKAHEAD = auto()
    """queries of tokens that are computed ahead, see `LookaheadPlan`"""


IN_THE_CACHE = Need.KEYS | Need.VALUES
"""Inputs already in the KV cache; collecting them costs nothing."""

ACCUMULATED = Need.ATTENTION_MASS | Need.OUTPUT_ERROR
"""Sums over all queries; each query is added once."""

NUM_ACCUMULATED = 32
"""Queries per request that are kept for such sums and added together. More of them take memory, fewer need more passes
over the keys; the sums are the same."""

NUM_ASKING = 16
"""Newest queries that ask which evicted tokens come back."""

FROM_RECENT_QUERIES = ACCUMULATED | Need.SEGMENTS
"""Computed from recent queries before the ring overwrites them."""

REPEATS = Need.HIDDEN | Need.RECURRENCE
"""Ways to tell whether a later sentence repeats an earlier one; a server collects at most one of the two."""
