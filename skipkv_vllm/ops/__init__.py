"""The tensor operations of the package.

The operators `torch.ops.skipkv.*` work on a batch of requests and all layers at once. `schema.py` declares them,
`torch_backend` defines what they compute, and `dispatch.py` chooses the backend that runs each. `functional.py` has
functions of one request and layer, which policies are written in.
"""

from .clusters import MOST_CLUSTERS, central_tokens
from .dispatch import function, report, warn_if_slow
from .effects import Effect, attention_effect, attention_weights, output_error
from .functional import (
    EPSILON,
    attention_logits,
    attention_received,
    attention_sparsity,
    importance,
    key_similarity,
    move_list,
    pooled,
    redundancy,
    sentence_penalties,
    vector_norms,
)
from .torch_backend import KEYWORD_SHIFT, RULES, STATE, THOUGHT

__all__ = [
    "EPSILON",
    "KEYWORD_SHIFT",
    "MOST_CLUSTERS",
    "RULES",
    "STATE",
    "THOUGHT",
    "Effect",
    "attention_effect",
    "attention_logits",
    "attention_received",
    "attention_sparsity",
    "attention_weights",
    "central_tokens",
    "function",
    "importance",
    "key_similarity",
    "move_list",
    "output_error",
    "pooled",
    "redundancy",
    "report",
    "sentence_penalties",
    "vector_norms",
    "warn_if_slow",
]
