"""The tokens that are central to their segment, of one request and layer, in PyTorch; see `functional.py`."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CLUSTERS = 64
"""Most tokens selected in a segment that is not selected as a whole."""

ROUNDS = 5
"""Rounds of K-means."""

TIE = 1e-4
"""Relative difference below which distances count as equal, e.g. those of both members of a cluster of two."""


def central_tokens(keys: Tensor, segment: Tensor, quota: Tensor, longest: int) -> Tensor:
    """Select the tokens nearest to the centroids of each segment's keys, one per cluster; ties go to the earlier token.

    K-means starts from tokens that are evenly spread over the segment, so the result is the same on every run. All
    tokens of a segment within its quota are selected, and none without a segment.

    Args:
        keys: float32 `[H, L, D]`.
        segment: int64 `[H, L]`, ascending; -1 or S for tokens without a segment.
        quota: int64 `[S]`, tokens to select in each segment: at least 1, and at most `MOST_CLUSTERS` in a segment with
            more tokens than that.
        longest: most tokens of a segment.

    Returns:
        bool `[H, L]`.
    """
    numbers = torch.arange(len(quota), device=keys.device).expand(len(keys), -1).contiguous()
    first = torch.searchsorted(segment.contiguous(), numbers)
    count = torch.searchsorted(segment.contiguous(), numbers, right=True) - first
    place = torch.arange(longest, device=keys.device)
    exists = place < count[..., None]
    index = (first[..., None] + place).clamp(max=segment.shape[1] - 1)  # [H, S, P]
    points = keys.gather(1, index.flatten(1)[..., None].expand(-1, -1, keys.shape[2])).view(*index.shape, -1)
    wanted = quota.minimum(count)
    cluster = torch.arange(min(longest, MOST_CLUSTERS), device=keys.device)
    used = cluster < wanted[..., None]
    start = ((2 * cluster + 1) * count[..., None] // (2 * wanted[..., None]).clamp(min=1)).clamp(max=longest - 1)
    centroids = points.gather(2, start[..., None].expand(*start.shape, points.shape[-1]))
    distance = assigned = torch.empty(0)
    for i in range(ROUNDS + 1):
        distance = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.masked_fill(~used[:, :, None], torch.inf)
        assigned = distance.argmin(dim=-1).masked_fill(~exists, len(cluster))
        if i < ROUNDS:
            member = (assigned[..., None] == cluster).to(points.dtype)
            size = member.sum(dim=2)[..., None]
            centroids = torch.where(size > 0, member.mT @ points / size.clamp(min=1), centroids)
    own = distance.masked_fill(assigned[..., None] != cluster, torch.inf)
    near = own.isfinite() & (own <= own.amin(dim=2, keepdim=True) * (1 + TIE))
    first_near = near.to(torch.uint8).argmax(dim=2, keepdim=True)
    central = (near & (first_near == place[:, None])).any(dim=-1) | (count <= quota)[..., None]
    chosen = (central & exists).long().flatten(1)
    return torch.zeros_like(segment).scatter_add(1, index.flatten(1), chosen) > 0
