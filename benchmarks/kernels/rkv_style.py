"""Scoring and compaction the way R-KV's published code does them, for comparison; layer by layer, heads together.

Keys are gathered into one tensor, their cosines form an L x L matrix, which is masked and searched as a whole; then
all survivors are gathered and written again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkv_vllm.ops.paging import LayerPages


def attention_scores(queries: Tensor, keys: Tensor, *, pool: int) -> Tensor:
    """Pooled attention `[Hkv, L - W]` of the last queries `[W, Hq, D]` to the older of keys `[Hkv, L, D]`."""
    window, query_heads, dim = queries.shape
    kv_heads, length, _ = keys.shape
    grouped = queries.transpose(0, 1).reshape(kv_heads, query_heads // kv_heads, window, dim)
    logits = torch.matmul(grouped, keys[:, None].transpose(2, 3)) / dim**0.5
    logits = logits.amax(dim=1)[..., : length - window]
    attention = logits.float().softmax(dim=-1).mean(dim=-2)
    return F.max_pool1d(attention, pool, stride=1, padding=pool // 2)


def similarity_scores(keys: Tensor, *, threshold: float) -> Tensor:
    """Softmax of the mean cosine `[Hkv, L]`, the last similar key of each row being spared."""
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = torch.matmul(unit, unit.transpose(-1, -2))
    for head in range(cosine.shape[0]):
        cosine[head].fill_diagonal_(0.0)
    mask = cosine > threshold
    column = torch.arange(cosine.shape[-1], device=keys.device)
    indices = torch.where(mask, column, torch.zeros_like(column))
    last = indices.topk(1, dim=-1).values
    cosine.scatter_(-1, last, 0.0)
    return cosine.mean(dim=1).softmax(dim=-1)


def score(
    layer: LayerPages, table: Tensor, length: int, queries: Tensor, *, pool: int, mix: float, threshold: float
) -> Tensor:
    """Scores `[Hkv, L - W]` of a layer whose tokens lie in order; the window has none."""
    keys = layer.keys.read_pages(table, length).contiguous()
    attention = attention_scores(queries, keys, pool=pool)
    similarity = similarity_scores(keys.float(), threshold=threshold)
    return attention * mix - similarity[:, : attention.shape[1]] * (1 - mix)


def survivors(scores: Tensor, budget: int, window: int) -> Tensor:
    """Slots `[Hkv, budget]` of the best tokens and the window, ascending."""
    best = scores.topk(budget - window, dim=-1).indices.sort(dim=-1).values
    newest = torch.arange(scores.shape[1], scores.shape[1] + window, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([best, newest], dim=-1)


def rewrite(layer: LayerPages, table: Tensor, length: int, kept: Tensor) -> None:
    """Gather K and V of all survivors and write them to the first slots."""
    heads, budget = kept.shape
    slot, head = torch.arange(budget, device=kept.device), torch.arange(heads, device=kept.device)[:, None]
    page, offset = table[slot // layer.page_size], slot % layer.page_size
    for cell in layer.cells:
        held = cell.read_pages(table, length)
        gathered = held.gather(1, kept[..., None].expand(-1, -1, held.shape[-1]))
        cell.scatter(page, head, offset, gathered)
