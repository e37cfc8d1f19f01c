"""The operators in Triton, for NVIDIA and AMD GPUs; `torch_backend` defines what each one computes.

They never wait for the device: grids follow from shapes, and the kernels read the lengths. On a CPU the kernels run in
Triton's interpreter, for tests. They read the pages of GPUs: K and V side by side (`Layout.ROWS`), and latents
(`Layout.LATENT`) with kernels of their own.
"""

from .compaction import compact_pages, held_positions, select_keep
from .launch import unavailable
from .measuring import central_tokens, pool_neighbours, vector_norms
from .recall import key_moments, recall_tokens, store_tokens, stored_attention
from .scoring import key_similarity, measure_attention, record_queries, score_tokens
from .sentences import sentence_similarity, token_penalties, track_sentences
from .thoughts import steer_add, track_thoughts

__all__ = [
    "central_tokens",
    "compact_pages",
    "held_positions",
    "key_moments",
    "key_similarity",
    "measure_attention",
    "pool_neighbours",
    "recall_tokens",
    "record_queries",
    "score_tokens",
    "select_keep",
    "sentence_similarity",
    "steer_add",
    "store_tokens",
    "stored_attention",
    "token_penalties",
    "track_sentences",
    "track_thoughts",
    "unavailable",
    "vector_norms",
]
