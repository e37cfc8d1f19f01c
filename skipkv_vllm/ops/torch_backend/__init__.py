"""The operators in PyTorch: their definitions, which every other backend must match, and the fallback.

They loop over requests and layers and read lengths on the host. `schema.py` has the schemas and the sizes.
"""

from .compaction import compact_pages, held_positions, select_keep
from .measuring import central_tokens, key_similarity, measure_attention, pool_neighbours, vector_norms
from .recall import key_moments, recall_tokens, store_tokens, stored_attention
from .scoring import record_queries, score_tokens
from .sentences import RULES, sentence_similarity, token_penalties, track_sentences
from .thoughts import KEYWORD_SHIFT, STATE, THOUGHT, steer_add, track_thoughts

__all__ = [
    "KEYWORD_SHIFT",
    "RULES",
    "STATE",
    "THOUGHT",
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
    "vector_norms",
]
