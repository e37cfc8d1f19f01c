"""The tensor operations of the package.

The operators `torch.ops.skipkv.*` work on a batch of requests and all layers at once. `schema.py` declares them,
`torch_backend` defines what they compute, and `dispatch.py` chooses the backend that runs each. `functional.py` has
functions of one request and layer, which policies are written in.
"""

from .dispatch import function, report, warn_if_slow
from .functional import (
    EPSILON,
    attention_logits,
    attention_received,
    attention_sparsity,
    importance,
    key_similarity,
    move_list,
    output_error,
    pooled,
    redundancy,
    sentence_penalties,
)
from .torch_backend import KEYWORD_SHIFT, RULES, STATE, THOUGHT

__all__ = [
    "EPSILON",
    "KEYWORD_SHIFT",
    "RULES",
    "STATE",
    "THOUGHT",
    "attention_logits",
    "attention_received",
    "attention_sparsity",
    "function",
    "importance",
    "key_similarity",
    "move_list",
    "output_error",
    "pooled",
    "redundancy",
    "report",
    "sentence_penalties",
    "warn_if_slow",
]
