"""Which tokens survive a compaction, and whether another choice differs by near ties only."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.settings import SelectionError

TIE_TOLERANCE = 1e-5


def select(evict_order: Tensor, pinned: Tensor, keep: int) -> Tensor:
    """Mark the survivors.

    Args:
        evict_order: int64 `[held]` indices of the held tokens, in the order of eviction.
        pinned: bool `[held]`.
        keep: number of survivors, the pinned included.

    Returns:
        Bool `[held]`.
    """
    leaving = evict_order[~pinned[evict_order]][: len(pinned) - keep]
    survives = torch.ones_like(pinned)
    survives[leaving] = False
    assert int(survives.sum()) == keep
    return survives


def select_tokens(scores: Tensor, pinned: Tensor, keep: int) -> Tensor:
    """Survivors `[held]` by token score `[held]`; of equal tokens the later one is evicted."""
    # Flipped, a stable ascending sort puts the later of two equal tokens first.
    order = len(scores) - 1 - scores.flip(0).sort(stable=True).indices
    return select(order, pinned, keep)


def select_sentences(scores: Tensor, pinned: Tensor, owner: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Survivors `[held]` by sentence, and each token's sentence score `[held]`, from token scores `[held]`."""
    by_sentence = torch.zeros_like(scores)
    for number in owner.unique().tolist():
        members = (owner == number) & ~pinned
        if members.any():
            by_sentence[members] = scores[members].mean()
    return select(by_sentence.sort(stable=True).indices, pinned, keep), by_sentence


def arbitrate(
    survives: Tensor, scores: Tensor, pinned: Tensor, engine: Tensor, where: str, tolerance: float = TIE_TOLERANCE
) -> int:
    """Check that the engine's selection differs by near ties only.

    Args:
        survives: bool `[held]`, the oracle's choice.
        scores: `[held]` scores of that choice.
        pinned: bool `[held]`.
        engine: bool `[held]`, the engine's choice, of the same number of tokens.
        where: for the message.
        tolerance: relative distance from the cut that is near.

    Returns:
        Number of the engine's survivors that the oracle would have evicted.

    Raises:
        SelectionError: a differing token's score is not near the cut.
    """
    differs = survives != engine
    if not differs.any():
        return 0
    if (differs & pinned).any():
        raise SelectionError(f"{where}: the engine evicted a pinned token")
    cut = (scores[survives & ~pinned].min() + scores[~survives].max()) / 2
    distance = (scores[differs] - cut).abs() / torch.maximum(scores[differs].abs(), cut.abs())
    if float(distance.max()) > tolerance:
        raise SelectionError(
            f"{where}: {int(differs.sum()) // 2} survivors differ, up to {float(distance.max()):.1e} from the cut: "
            f"the oracle keeps {(survives & ~engine).nonzero().flatten().tolist()}, "
            f"the engine keeps {(engine & ~survives).nonzero().flatten().tolist()} (indices into the held tokens)"
        )
    return int(differs.sum()) // 2
