"""The inputs of a policy: what it sees of one request in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The S segments of a request's text behind the protected prompt and before the window; the same for all layers.

    Attributes:
        sparsity: float32 `[S]`, share of the attention weights of a segment's last queries that count as zero, averaged
            over heads and the layers chosen; -1 where a segment is still being written.
        memory: int64 `[S]`, what the method noted of each segment at the last compaction; 0 for new ones.
        sizes: int64 `[S]`, tokens written of each.
        num_free: tokens of them all that a head may keep.
        longest: tokens of a whole segment.
    """

    sparsity: Tensor
    memory: Tensor
    sizes: Tensor
    num_free: int
    longest: int


@dataclass(frozen=True)
class View:
    """What a policy sees of one request in one layer. L held tokens, H kv heads, in ascending position.

    Attributes:
        positions: logical positions `[H, L]`, int32.
        window: W, the number of newest tokens, which always survive.
        num_keep: tokens that will be kept of each head.
        num_logical: tokens computed so far; the newest held one has position `num_logical - 1`.
        num_prompt: length of the prompt.
        num_protected: first tokens that always stay: of a protected prompt its length, else 0.
        layer: index of the layer in the model.
        first_head: index in the model of the first of these kv heads; others may be on other ranks.
        keys: post-RoPE keys `[L, H, D]`, or None unless `Need.KEYS`.
        values: `[L, H, D]`, or None unless `Need.VALUES`.
        queries: the last W post-RoPE queries `[W, Hq, D]`, oldest first, or None unless `Need.QUERIES`.
        sentence_penalty: `[H, L]` float32, 0 to 1: with `Need.HIDDEN` the similarity to the later sentence that repeats
            a token's sentence, and 0 elsewhere; with `Need.RECURRENCE` the share of the sentence's tokens that later
            text repeats; else None.
        attention_mass: `[H, L]` float32, sum over all queries since the end of the prompt (its last token's
            included) of the attention paid to the token, averaged over the query heads of the kv head; or
            None unless `Need.ATTENTION_MASS`.
        output_error: `[H, L]` float32, mean of `A^2 |v - o|^2` over the queries that saw the token, older ones
            discounted by `Policy.decay`; see `ops.output_error`. None unless `Need.OUTPUT_ERROR`, and in the engine,
            which calls `Policy.rank` instead of `score`.
        segment: int64 `[H, L]`, number of each token's segment, -1 in the protected prompt and S in the window; or None
            unless `Need.SEGMENTS`.
        segments: what is known of the segments, with what `Policy.remember` just noted; or None likewise.
        gates: `[H, L]` float32, what the learned gates said of the token when it was written (`log beta`, not
            above 0), or None unless `Need.GATES`.
        lookahead_queries: post-RoPE queries `[n, Hq, D]` of the beginning of an answer (see `LookaheadPlan`), which see
            all held tokens; None but at the end of a prompt, and where no pages were free for them.
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


@dataclass(frozen=True)
class Measured:
    """What is measured of held tokens, by rows of any number of requests, layers and heads; all of shape `[..., N]`.

    Attributes:
        output_error: float32, see `View`.
        key_similarity: float32, cosine of the key with the mean of its row's unit keys.
        repeated: float32, share of the tokens of the token's sentence that later text repeats.
        is_recent: bool, whether the token is one of the `Policy.num_recent` newest.
        is_free: bool, whether it may leave; False for protected tokens, the window, and where there is no token.
    """

    output_error: Tensor
    key_similarity: Tensor
    repeated: Tensor
    is_recent: Tensor
    is_free: Tensor
