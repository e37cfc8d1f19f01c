"""Which tokens a region of slots holds: those that are asked for, and its owners, which a compaction left there.

Tokens are named by their places 0 to N - 1 in the store; place N stands for none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def best(asked: Tensor, owner: Tensor, least: float) -> Tensor:
    """Return which tokens to hold in a region of n slots: those that are asked for most, then its worthiest owners.

    Args:
        asked: float32 `[R, layers, H, N + 1]`, evidence of those that may come or stay, at least `least`, or 0.
        owner: int64 `[R, layers, H, n]`, places of the owners, that of the least worth first; N for none.
        least: see above.

    Returns:
        bool `[R, layers, H, N + 1]`.
    """
    most = owner.shape[-1]
    by_worth = torch.arange(1, most + 1, device=asked.device) * (least / (most + 1))
    wanted = torch.zeros_like(asked).scatter_(-1, owner, by_worth.expand(owner.shape)).maximum(asked)
    wanted[..., -1] = 0
    length = wanted.shape[-1] - 1
    value, place = largest(wanted, most)
    return marked(torch.where(value > 0, place, length), length)


def placed(is_wanted: Tensor, owner: Tensor, present: Tensor) -> Tensor:
    """Return which token each slot of a region gets: its owner, or what is there, or what comes, by position.

    Args:
        is_wanted: bool `[R, layers, H, N + 1]`, tokens to hold, at most n.
        owner: int64 `[R, layers, H, n]`, place of the owner of each slot.
        present: int64 `[R, layers, H, n]`, place of the token that is there. It stays if too few come.

    Returns:
        int64 `[R, layers, H, n]`.
    """
    length = is_wanted.shape[-1] - 1
    is_owners, is_guest = is_wanted.gather(-1, owner), is_wanted.scatter(-1, owner, False)
    stays = is_guest.gather(-1, present) & ~is_owners
    coming = is_guest & ~marked(torch.where(stays, present, length), length)
    is_coming, place = largest(coming.float(), owner.shape[-1])
    free = (is_owners | stays).byte().sort(dim=-1, stable=True).indices
    after = present.scatter(-1, free, torch.where(is_coming > 0, place, present.gather(-1, free)))
    return torch.where(is_owners, owner, after)


def marked(places: Tensor, length: int) -> Tensor:
    """Mark places `[R, layers, H, n]` up to `length`, the last of which is void: bool `[R, layers, H, length + 1]`."""
    marked = torch.zeros(*places.shape[:3], length + 1, dtype=torch.bool, device=places.device)
    marked.scatter_(-1, places, True)[..., -1] = False
    return marked


def largest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the largest of values `[..., N]` >= 0 and their places, descending; of equal ones the first comes first.

    A stable sort would do the same, in several times the time. Zeros at places from N on make up for missing values.
    """
    values = F.pad(values, (0, max(0, number - values.shape[-1])))
    # The bits of floating-point numbers that are not negative are in the order of the numbers.
    behind = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    largest = (values.view(torch.int32).long() << 32 | behind).topk(number, dim=-1).values
    return (largest >> 32).int().view(torch.float32), values.shape[-1] - 1 - (largest & 0x7FFFFFFF)
