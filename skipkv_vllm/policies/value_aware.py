"""What the value-aware methods share: they weigh what a token adds to the attention output, not attention alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.errors import KVPolicyError
from ..core.needs import Need
from .base import Policy, View, make_policy, policies_with_weights


@dataclass(frozen=True)
class ValueAware(Policy):
    """A method that reads values and takes the attention weights of another one.

    Attributes:
        base: the other method, with its default parameters.
    """

    base: str = "snapkv"

    def __post_init__(self) -> None:
        if self.base not in policies_with_weights():
            raise KVPolicyError(
                f"kv_policy_config: base={self.base!r} gives no attention weights; choose one of: "
                f"{', '.join(policies_with_weights())}"
            )

    @property
    def needs(self) -> Need:  # type: ignore[override]
        """What the base needs, and values."""
        return make_policy(self.base).needs | Need.VALUES

    def base_weights(self, view: View) -> Tensor:
        """Attention weights by the base's account: float32 `[H, L]`."""
        weights = make_policy(self.base).weights(view)
        assert weights is not None
        return weights


def values_of(view: View) -> Tensor:
    """float32 `[H, L, D]`."""
    assert view.values is not None
    return view.values.float().transpose(0, 1)
