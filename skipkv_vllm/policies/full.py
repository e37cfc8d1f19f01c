"""`full`: nothing is evicted. On a server it means "off"; in a request it means "leave this one alone"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import About, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class Full(Policy):
    """Full KV. The scheduler never compacts such a request, so there is nothing to score."""

    name: ClassVar[str] = "full"
    about: ClassVar[About] = About("full KV", cost="none")

    def score(self, view: View) -> Tensor:
        raise NotImplementedError("policy 'full' evicts nothing and is never asked for a score")
