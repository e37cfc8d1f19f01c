"""The tensor operations of the package.

`torch.ops.skipkv.*` work on a batch of requests and all layers at once; `schema.py` has their signatures, `batched.py`
what they compute, `dispatch.py` which backend runs them. `reference.py` has the PyTorch definitions for one
request and layer that policies are written in.
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
