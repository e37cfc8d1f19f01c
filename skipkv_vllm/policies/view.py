"""Inputs of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of a request's text between the protected prompt and the window; the same for all layers.

    They are `[S]` of one request, or `[R, S]` of several; of those with fewer the last ones are empty.

    Attributes:
        sparsity: float32 `[..., S]`, share of the attention weights of a segment's last queries that count as zero,
            averaged over heads and the chosen layers; -1 for a segment that is still being written.
        memory: int64 `[..., S]`, number that `Policy.remember` returned for each segment at the last compaction; 0 for
            new segments.
        sizes: int64 `[..., S]`, tokens written in each segment.
        num_free: int64 `[...]`, tokens of all segments together that a head may keep.
        longest: tokens of a complete segment.
    """

    sparsity: Tensor
    memory: Tensor
    sizes: Tensor
    num_free: Tensor
    longest: int


@dataclass(frozen=True)
class View:
    """One request in one layer: L held tokens in ascending position, H kv heads.

    Attributes:
        positions: logical positions `[H, L]`, int32.
        window: W, number of newest tokens, which always survive.
        num_keep: tokens that each head will keep.
        num_logical: tokens computed so far; the newest held token has position `num_logical - 1`.
        num_prompt: length of the prompt.
        num_protected: number of first tokens that always stay: the prompt's length if it is protected, else 0.
        layer: index of the layer in the model.
        first_head: index in the model of the first of these kv heads; other ranks may hold others.
        keys: post-RoPE keys `[L, H, D]`, or None unless `Need.KEYS`.
        values: `[L, H, D]`, or None unless `Need.VALUES`.
        queries: the last W post-RoPE queries `[W, Hq, D]`, oldest first, or None unless `Need.QUERIES`.
        sentence_penalty: `[H, L]` float32, 0 to 1. With `Need.HIDDEN`, the similarity of a token's sentence to the
            later sentence that repeats it, or 0; with `Need.RECURRENCE`, the share of the sentence's tokens that later
            text repeats; else None.
        attention_mass: `[H, L]` float32, attention that the token received from all queries from the prompt's last
            token on, averaged over the query heads of the kv head; None unless `Need.ATTENTION_MASS`.
        output_error: `[H, L]` float32, mean of `A^2 |v - o|^2` over the queries that saw the token, older ones
            discounted by `Policy.decay`; see `ops.output_error`. None unless `Need.OUTPUT_ERROR`.
        segment: int64 `[H, L]`, number of each token's segment, -1 in the protected prompt and S in the window; None
            unless `Need.SEGMENTS`.
        segments: the segments, whose `memory` `Policy.remember` has just updated; None unless `Need.SEGMENTS`.
        gates: `[H, L]` float32, output of the learned gates when the token was written (`log beta`, at most 0); None
            unless `Need.GATES`.
        lookahead_queries: post-RoPE queries `[n, Hq, D]` of the beginning of an answer (see `LookaheadPlan`), which see
            all held tokens. None except at the end of a prompt, and there if no lookahead blocks were free.
        sink_logits: float32 `[Hq]`, logit of an attention sink of each query head; None if the layer has none. See
            `ops.attention_received`.
    """

    positions: Tensor
    window: int
    num_keep: int = 0
    num_logical: int = 0
    num_prompt: int = 0
    num_protected: int = 0
    layer: int = 0
    first_head: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    sentence_penalty: Tensor | None = None
    attention_mass: Tensor | None = None
    output_error: Tensor | None = None
    segment: Tensor | None = None
    segments: Segments | None = None
    gates: Tensor | None = None
    lookahead_queries: Tensor | None = None
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """Measurements of held tokens for any number of requests, layers and heads; all of shape `[..., N]`.

    Attributes:
        output_error: float32, see `View`.
        key_similarity: float32, cosine of the key with the mean of the unit keys along N.
        repeated: float32, share of the tokens of this token's sentence that later text repeats.
        is_recent: bool, whether the token is one of the newest `SkipKV.num_recent`.
        is_free: bool, whether the token may be evicted; False for protected tokens, the window and padding.
    """

    output_error: Tensor
    key_similarity: Tensor
    repeated: Tensor
    is_recent: Tensor
    is_free: Tensor
