"""Scores and selections of one request and layer, in PyTorch. Policies and `torch_backend` use them.

None of them waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import KVPolicyError
from .effects import Effect, attention_effect, attention_weights

EPSILON = 1e-8
"""Added to the length of a vector that becomes a unit vector."""


def importance(queries: Tensor, keys: Tensor, *, window: int, pool: int) -> Tensor:
    """Compute how much the last queries attend to each older key (SkipKV eq. 4, R-KV).

    Logits `q.k / sqrt(D)`; maximum over the GQA group (before the softmax); softmax over the first L - W
    keys in float32; mean over the queries; max-pooling over neighbours in positional order.

    Args:
        queries: post-RoPE queries `[W, Hq, D]`.
        keys: post-RoPE keys `[L, Hkv, D]` in ascending position; the last W are the window.
        window: W.
        pool: odd width of the max-pooling.

    Returns:
        float32 `[Hkv, L - W]`.

    Raises:
        KVPolicyError: shapes that do not fit each other.
    """
    n_queries, q_heads, dim = queries.shape
    length, kv_heads, key_dim = keys.shape
    if n_queries != window or dim != key_dim or q_heads % kv_heads or length <= window:
        raise KVPolicyError(
            f"importance: queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not fit window={window}; "
            "expected [W, Hq, D] and [L, Hkv, D] with L > W and Hq a multiple of Hkv"
        )
    grouped = queries.float().view(window, kv_heads, q_heads // kv_heads, dim)
    logits = torch.einsum("whgd,lhd->hwgl", grouped, keys[: length - window].float()) / dim**0.5
    attention = logits.amax(dim=2).softmax(dim=-1).mean(dim=1)
    return F.max_pool1d(attention.unsqueeze(0), pool, stride=1, padding=pool // 2).squeeze(0)


def pooled(scores: Tensor, window: int, pool: int) -> Tensor:
    """Max-pool scores `[H, L]` over `pool` neighbours older than the window.

    The window's own tokens score 0; the runtime pins them, so any number would do.
    """
    old = scores[:, : scores.shape[1] - window]
    largest = F.max_pool1d(old.unsqueeze(0), pool, stride=1, padding=pool // 2).squeeze(0)
    return F.pad(largest, (0, window))


def attention_logits(queries: Tensor, keys: Tensor, positions: Tensor, ahead: int = 0) -> Tensor:
    """Compute the scaled logits of the last queries at each resident token.

    Args:
        queries: post-RoPE queries `[n, Hq, D]` of the n newest tokens, oldest first.
        keys: post-RoPE keys `[Hkv, L, D]`, in any order.
        positions: logical position of each key, `[Hkv, L]`.
        ahead: by how many tokens the last query is newer than the newest key.

    Returns:
        float32 `[Hkv, Hq / Hkv, n, L]`, minus infinity for tokens in a query's future.

    Raises:
        KVPolicyError: shapes that do not fit each other.
    """
    return logits_until(queries, keys, positions, positions.amax(dim=1)[:, None] + ahead)


def logits_until(queries: Tensor, keys: Tensor, positions: Tensor, newest: Tensor | int) -> Tensor:
    """Compute `attention_logits` of queries of which the last one has position `newest`, a number or `[Hkv, 1]`."""
    n_queries, q_heads, dim = queries.shape
    kv_heads, length, key_dim = keys.shape
    if dim != key_dim or q_heads % kv_heads or positions.shape != (kv_heads, length) or n_queries > length:
        raise KVPolicyError(
            f"attention_logits: queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and positions "
            f"{tuple(positions.shape)} do not fit; expected [n, Hq, D], [Hkv, L, D], [Hkv, L], n <= L, Hkv | Hq"
        )
    grouped = queries.float().view(n_queries, kv_heads, q_heads // kv_heads, dim)
    logits = torch.einsum("whgd,hld->hgwl", grouped, keys.float()) / dim**0.5
    reach = newest - (n_queries - 1) + torch.arange(n_queries, device=positions.device).expand(kv_heads, -1)
    future = positions[:, None, :] > reach[:, :, None]
    return logits.masked_fill(future[:, None], -torch.inf)


def attention_received(
    queries: Tensor, keys: Tensor, positions: Tensor, ahead: int = 0, sinks: Tensor | None = None
) -> Tensor:
    """Compute the attention that each resident token receives from the last queries.

    Softmax in float32 over the resident tokens that are not in a query's future; sum over the queries; mean over
    the query heads of a kv head.

    Args:
        queries: post-RoPE queries `[n, Hq, D]` of the n newest tokens, oldest first.
        keys: post-RoPE keys `[Hkv, L, D]`, in any order.
        positions: logical position of each key, `[Hkv, L]`.
        ahead: by how many tokens the last query is newer than the newest key.
        sinks: float32 `[Hq]`, logit of an attention sink of each query head (gpt-oss), which takes a share of the
            attention as a token with the value zero would; None if there are none.

    Returns:
        float32 `[Hkv, L]`, rows summing to n less the share of the sinks.

    Raises:
        KVPolicyError: shapes that do not fit each other.
    """
    return attention_weights(attention_logits(queries, keys, positions, ahead), sinks).sum(dim=2).mean(dim=1)


def key_similarity(keys: Tensor) -> Tensor:
    """Compute the cosine of each key `[Hkv, L, D]` with the mean of all unit keys, float32 `[Hkv, L]`."""
    unit = keys.float()
    unit = unit / (unit.norm(dim=-1, keepdim=True) + EPSILON)
    mean = unit.mean(dim=1, keepdim=True)
    return (unit * (mean / (mean.norm(dim=-1, keepdim=True) + EPSILON))).sum(dim=-1)


def attention_sparsity(queries: Tensor, keys: Tensor, positions: Tensor, *, negligible: float) -> Tensor:
    """Compute the share of attention weights that are negligible beside the largest of their row.

    Args:
        queries: post-RoPE queries `[n, Hq, D]` of the n newest tokens, oldest first.
        keys: post-RoPE keys `[Hkv, L, D]`, in any order.
        positions: logical position of each key, `[Hkv, L]`.
        negligible: share of the largest weight below which another one is negligible.

    Returns:
        float32 `[Hkv]`, over the tokens that a query sees; averaged over queries and query heads.

    Raises:
        KVPolicyError: shapes that do not fit each other.
    """
    logits = attention_logits(queries, keys, positions)
    return attention_effect(logits, None, Effect.NEGLIGIBLE, negligible).sum(dim=-1) / len(queries)


def dequantised(query: Tensor, scale: Tensor) -> Tensor:
    """Compute the queries `[T, Hq, D]`, float32, that vLLM quantised for an attention kernel with 8-bit queries.

    Args:
        query: `[T, Hq, D]`, float8_e4m3fn or float8_e5m2.
        scale: float32, of any shape: one number, or one for each group of consecutive query heads.

    Raises:
        KVPolicyError: the query heads do not share the scales.
    """
    heads, scales = query.shape[1], scale.numel()
    if scales == 0 or heads % scales:
        raise KVPolicyError(f"record_queries: {heads} query heads do not share {scales} scales")
    return query.float() * scale.flatten().repeat_interleave(heads // scales)[:, None]


def vector_norms(vectors: Tensor, norm: int, part: int = 0, weights: Tensor | None = None) -> Tensor:
    """Compute the norm of each vector, or of its distance from a centre.

    Args:
        vectors: `[H, L, D]`, in ascending position.
        norm: 1 or 2.
        part: number of consecutive vectors that share a centre, their mean; 0 for no centre.
        weights: float32 `[H, L]`; the centre of a part is the sum with these weights instead of the mean.

    Returns:
        float32 `[H, L]`.
    """
    vectors = vectors.float()
    if part > 0:
        parts = vectors.split(part, dim=1)
        centres = [each.mean(dim=1, keepdim=True) for each in parts]
        if weights is not None:
            shares = weights[..., None].split(part, dim=1)
            centres = [(share * each).sum(dim=1, keepdim=True) for share, each in zip(shares, parts, strict=True)]
        vectors = torch.cat([each - centre for each, centre in zip(parts, centres, strict=True)], dim=1)
    return vectors.norm(p=norm, dim=-1)


def redundancy(keys: Tensor, *, threshold: float) -> Tensor:
    """Compute how similar each key is to all others except the last similar one (SkipKV eq. 5, R-KV).

    `S` is the cosine matrix of the keys with a zero diagonal. In every row i the last column j with
    `S_ij > threshold` is set to zero (column 0 where there is none), so the newest of a set of similar
    keys is spared. `R_j = softmax_j(mean_i S_ij)`.

    Args:
        keys: post-RoPE keys `[L, Hkv, D]` in ascending position.
        threshold: cosine above which two keys are similar.

    Returns:
        float32 `[Hkv, L]`.
    """
    unit = keys.float().transpose(0, 1)
    unit = unit / (unit.norm(dim=-1, keepdim=True) + EPSILON)
    cosine = unit @ unit.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    column = torch.arange(keys.shape[0], device=keys.device)
    last = torch.where(cosine > threshold, column, 0).amax(dim=-1, keepdim=True)
    cosine.scatter_(-1, last, 0.0)
    return cosine.mean(dim=1).softmax(dim=-1)


def sentence_penalties(embeddings: Tensor, exists: Tensor, *, threshold: float, rule: str = "max") -> Tensor:
    """Compute the similarity of each sentence to a later sentence that repeats it, or 0 (SkipKV eqs. 1, 3).

    Args:
        embeddings: unit vectors `[S, E]`, in the order in which the sentences were written.
        exists: bool `[S]`; rows without a sentence neither flag nor are flagged.
        threshold: the earlier of two sentences is flagged when their cosine is strictly above this.
        rule: with several repeats, "max" takes the highest similarity, "last" the latest repeat's.

    Returns:
        float32 `[S]`.
    """
    cosine = embeddings.float() @ embeddings.float().T
    later = torch.ones_like(cosine, dtype=torch.bool).triu(1)
    repeats = (cosine > threshold) & later & exists & exists[:, None]
    if rule == "max":
        return torch.where(repeats, cosine, 0.0).amax(dim=1)
    order = torch.arange(cosine.shape[0], device=cosine.device)
    last = torch.where(repeats, order, 0).amax(dim=1, keepdim=True)
    return torch.where(repeats.any(dim=1), cosine.gather(1, last).squeeze(1), 0.0)


def select_per_head(scores: Tensor, pinned: Tensor, num_keep: int) -> Tensor:
    """Select the best tokens of every layer and kv head independently (granularity "head").

    Args:
        scores: `[layers, H, L]`, higher is kept longer.
        pinned: bool `[layers, H, L]`, tokens that stay regardless of their score; at most `num_keep` a row.
        num_keep: tokens to keep in every row.

    Returns:
        bool `[layers, H, L]` with exactly `num_keep` true in every row. Of equal scores the earlier stays.
    """
    ranked = scores.masked_fill(pinned, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(pinned).scatter(-1, ranked[..., :num_keep], True)


def move_list(kept: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the moves after which the kept tokens of each row fill the first `num_keep` slots.

    A kept token in one of the first `num_keep` slots stays where it is; one beyond them moves into the
    slot of an evicted token. Sources and holes never overlap, so the moves need no temporary copy.

    Args:
        kept: bool `[..., L]` by slot; exactly `num_keep` are true in every row.
        num_keep: K.

    Returns:
        `source`, `hole` and `valid`, each `[..., M]` with `M = min(K, L - K)`: slot `source` moves to slot
        `hole` where `valid`; other entries are padding.
    """
    length = kept.shape[-1]
    moves = min(num_keep, length - num_keep)
    # Sorting a boolean stably lists the true entries first, in ascending order.
    holes = (~kept[..., :num_keep]).sort(dim=-1, descending=True, stable=True)
    movers = kept[..., num_keep:].sort(dim=-1, descending=True, stable=True)
    return movers.indices[..., :moves] + num_keep, holes.indices[..., :moves], movers.values[..., :moves]
