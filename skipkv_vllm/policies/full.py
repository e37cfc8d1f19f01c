"""`full`: evict nothing. As a server's policy it turns eviction off; in a request it exempts that request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import About, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class Full(Policy):
    """Full KV. The scheduler never compacts such a request, so no token is scored."""

    name: ClassVar[str] = "full"
    about: ClassVar[About] = About("full KV", cost="none")

    def score(self, view: View) -> Tensor:
        raise NotImplementedError("policy 'full' evicts nothing, so it has no score")
