"""What a policy asks the workers to collect."""

from __future__ import annotations

from enum import Flag, auto


class Need(Flag):
    """What the runtime must collect for a policy; a policy pays only for what it reads."""

    NOTHING = 0
    QUERIES = auto()
    """the last W post-RoPE queries of every layer"""
    KEYS = auto()
    """the held keys, gathered in positional order"""
    VALUES = auto()
    """the held values, likewise"""
    SENTENCES = auto()
    """sentence boundaries (from token ids)"""
    HIDDEN = auto()
    """sentence embeddings and the penalties of repeated sentences (from last hidden states)"""
    RECURRENCE = auto()
    """how much of each sentence later text repeats (from token ids)"""
    ATTENTION_MASS = auto()
    """the attention that every held token has received so far; comes with the keys and queries it is made of"""
    OUTPUT_ERROR = auto()
    """what leaving a held token out changes in the outputs of the queries since it was written, on average; comes with
    the keys, values and queries it is made of; not together with `ATTENTION_MASS`"""
    SEGMENTS = auto()
    """how sparse attention was at the end of every segment of the text, and a number that the method keeps of each;
    not together with `ATTENTION_MASS`"""
    GATES = auto()
    """what learned gates said of every held token when it was written; `Policy.gates_file` names them"""
    PROBE = auto()
    """queries of tokens that are computed ahead, see `Probe`"""


IN_THE_CACHE = Need.KEYS | Need.VALUES
"""What is there without being collected."""


ACCUMULATED = Need.ATTENTION_MASS | Need.OUTPUT_ERROR
"""Sums over all queries, so every query is used once."""


NUM_ACCUMULATED = 32
"""Queries that the workers keep of each request for such sums, and use together. More take memory, fewer make more
passes over the keys; the sums are the same."""


OBSERVED = ACCUMULATED | Need.SEGMENTS
"""What is made of the attention of queries while they are there."""


REPEATS = Need.HIDDEN | Need.RECURRENCE
"""What says of a sentence whether a later one repeats it; a server collects one of the two."""
